"""Shared parts of an output head's losses: their parameters, dispatch, fake and autograd.

Each op takes the head's inputs and returns the loss and, where they are wanted, the gradients that were computed on
the way: `(loss, dhidden, dweight, dbias)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from llmkern.dispatch import dispatch
from llmkern.library import define
from llmkern.ops._loss import LossOptions, loss_dtype

__all__ = [
    "LinearCrossEntropy",
    "LinearJsd",
    "Outputs",
    "as_rows",
    "define_linear_loss",
    "run_linear_loss",
    "under_autocast",
]

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""loss, dhidden, dweight, dbias; gradients have 0 elements where they are not wanted."""


class LinearCrossEntropy(NamedTuple):
    """Arguments of `linear_cross_entropy`, in the order of its schema."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    weight_scale: Tensor | None  # [V, 1]
    labels: Tensor  # [N]
    class_weight: Tensor | None  # [V], in the dtype of the loss
    scale: Tensor | None  # [N], in the dtype of the loss
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    reduction: str
    hidden_grad: bool
    weight_grad: bool

    @property
    def options(self) -> LossOptions:
        return LossOptions(self.ignore_index, self.label_smoothing, self.z_loss, self.softcap)


class LinearJsd(NamedTuple):
    """Arguments of `linear_jsd`, in the order of its schema; those of `linear_kl_div` have `reverse` for `beta`."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    teacher_hidden: Tensor | None  # [N, G]
    teacher_weight: Tensor | None  # [V, G]
    teacher_bias: Tensor | None  # [V]
    teacher_logits: Tensor | None  # [N, V], or [N, K] of teacher_words
    teacher_words: Tensor | None  # [N, K]
    scale: Tensor  # [N], in the dtype of the loss
    beta: float
    temperature: float
    reduction: str
    hidden_grad: bool
    weight_grad: bool


def as_rows(tensor: Tensor) -> Tensor:
    """Return [..., H] as [N, H]."""
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.flatten(0, -2)


def under_autocast(lead: Tensor, *others: Any) -> tuple[Any, ...]:
    """Return these arguments as autocast makes those of a linear layer: floating tensors in its dtype."""
    device = lead.device.type
    if not torch.is_autocast_enabled(device) or lead.dtype == torch.float64:
        return lead, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple([t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in (lead, *others)])


def run_linear_loss(
    op: str,
    shape: Sequence[int],
    reduction: str,
    hidden_grad: bool | None,
    weight_grad: bool | None,
    **call: Any,
) -> Tensor:
    """Dispatch `op` and return its loss, of `shape` for the reduction "none".

    hidden_grad, weight_grad: None to compute the gradients that are needed, unless a factor of each row's is not known
        before the backward pass ("none"), or has to be in them before they are rounded (fp16).
    call: the op's other arguments.
    """
    hidden, weight, bias = call["hidden"], call["weight"], call["bias"]
    keep = torch.is_grad_enabled() and reduction != "none" and hidden.dtype != torch.float16
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    loss, *_ = dispatch(
        op,
        **call,
        reduction="none" if reduction == "none" else "sum",
        hidden_grad=keep and hidden.requires_grad if hidden_grad is None else hidden_grad,
        weight_grad=keep and trained if weight_grad is None else weight_grad,
    )
    return loss.view(shape) if reduction == "none" else loss


def define_linear_loss(op: str, arguments: str, parameters: Any, hint: str) -> None:
    """Define an op from the arguments of its schema.

    parameters: NamedTuple of these arguments: hidden, weight, bias, further tensors, `scale`, and what is no tensor.
        The loss is the sum of the rows' times `scale`, or each row's with reduction "none"; gradients are the sum's.
    hint: what can be differentiated twice, as this cannot.
    """
    fields = parameters._fields
    tensors = fields.index("scale") + 1

    def fake(*args: Any, **named: Any) -> Outputs:
        call = parameters(*args, **named)
        hidden, bias = call.hidden, call.bias
        return (
            hidden.new_empty(() if call.reduction == "sum" else hidden.shape[:1], dtype=loss_dtype(hidden)),
            hidden.new_empty(hidden.shape if call.hidden_grad else 0),
            hidden.new_empty(call.weight.shape if call.weight_grad else 0),
            hidden.new_empty(bias.shape if call.weight_grad and bias is not None else 0),
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.rest = inputs[tensors:]
        ctx.save_for_backward(*inputs[:tensors], *output[1:])

    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True, and the gradients were made without one
            raise RuntimeError(f"{op}: its gradient cannot be differentiated again; {hint}")
        saved = ctx.saved_tensors
        call = parameters(*saved[:tensors], *ctx.rest)
        needed = ctx.needs_input_grad[:3]
        return *_gradients(op, call, dloss, saved[tensors:], needed), *[None] * (len(fields) - 3)

    returns = "(Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)"
    define(f"{op}({arguments}) -> {returns}", fake=fake, backward=backward, setup_context=setup_context)


def _gradients(
    op: str, call: Any, dloss: Tensor, gradients: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of hidden, weight and bias that are `needed`: those that were kept, or computed now."""
    wanted = needed[0], needed[1] or needed[2]
    kept = call.hidden_grad, call.weight_grad
    factor: Tensor | None = dloss
    if call.reduction == "none" or any(want and not has for want, has in zip(wanted, kept, strict=True)):
        factor = None
        scale = dloss.expand(call.hidden.shape[:1])
        _, *gradients = dispatch(
            op,
            **call._asdict()
            | {
                "hidden": call.hidden.detach(),
                "weight": call.weight.detach(),
                "bias": None if call.bias is None else call.bias.detach(),
                "scale": scale if call.scale is None else call.scale * scale,
                "reduction": "sum",
                "hidden_grad": wanted[0],
                "weight_grad": wanted[1],
            },
        )
    elif not is_compiling() and type(dloss) is Tensor and dloss.is_cpu and float(dloss) == 1.0:
        factor = None  # another pass over a gradient as large as the weight
    return [
        None if not need else gradient if factor is None else gradient * factor.to(gradient.dtype)
        for gradient, need in zip(gradients, needed, strict=True)
    ]
