"""How far a student's output head is from its teacher's: the Kullback-Leibler divergence of their next tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.checks import (
    check_dtype,
    check_finite,
    check_flag,
    check_floating,
    check_has_hidden,
    check_same_device,
    check_same_dtype,
    check_shape,
    given,
    shape_text,
)
from llmkern.dispatch import dispatch
from llmkern.library import define
from llmkern.ops._loss import backward_of_linear_loss, loss_dtype, row_scale

__all__ = ["linear_kl_div"]

_OP = "linear_kl_div"


def linear_kl_div(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
    scale: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    reverse: bool = False,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    hidden_grad: bool | None = None,
    weight_grad: bool | None = None,
) -> Tensor:
    """`T² · KL(teacher ‖ student)` of the softmax of both heads' logits over T, a chunk of rows at a time.

    Hinton et al. 2015 (arXiv:1503.02531): T² keeps the gradients' size whatever the temperature.  Neither the
    student's nor the teacher's logits are ever in memory all at once.

    hidden: [..., H], fp32, bf16, fp16 or fp64, any strides.  weight: [V, H] and bias: [V], in hidden's dtype.
    teacher_hidden: hidden's shape but for the last dimension, G.  teacher_weight: [V, G] and teacher_bias: [V]; a
        floating dtype of their own.  Frozen: what requires a gradient is refused.
    labels: int64, hidden's shape without H; rows whose label is ignore_index are left out.  None: all rows count.
    scale: a factor of each row's divergence; labels' shape, in the dtype of the loss, no gradient; 0 leaves a row out.
    temperature: T, above 0.  reverse: KL(student ‖ teacher), which prefers what the teacher is sure of.
    reduction: "mean" over the rows that count, or over `num_items`; "sum"; "none" for each row's, 0 where left out.
    hidden_grad, weight_grad: as in `linear_cross_entropy`.
    Returns the divergence in fp32 (fp64 for fp64).  A word whose probability is 0 on the left adds 0.  Differentiable,
    once, in hidden, weight and bias.
    Raises TypeError for other dtypes, ValueError for other shapes, devices or values.
    """
    check_floating(_OP, hidden=hidden, weight=weight, **given(bias=bias))
    check_has_hidden(_OP, "hidden", hidden)
    check_floating(
        _OP,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        **given(teacher_bias=teacher_bias, scale=scale),
    )
    check_has_hidden(_OP, "teacher_hidden", teacher_hidden)
    _check(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    check_finite(_OP, "temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"{_OP}: temperature is {temperature}, expected a finite number above 0")
    check_flag(_OP, reverse=reverse)
    rows = hidden.reshape(-1, hidden.shape[-1]) if hidden.numel() else hidden.flatten(0, -2)
    given_rows = teacher_hidden.reshape(-1, teacher_hidden.shape[-1]) if rows.numel() else teacher_hidden.flatten(0, -2)
    if labels is None:
        labels = hidden.new_zeros(hidden.shape[:-1], dtype=torch.int64)
    check_dtype(_OP, "labels", labels, torch.int64)
    check_shape(_OP, "labels", labels, hidden.shape[:-1], "the shape of hidden without its last dimension")
    check_shape(_OP, "scale", scale, labels.shape, "the shape of labels")
    check_same_device(_OP, "hidden", hidden, labels=labels, scale=scale)
    targets = labels.reshape(-1)
    factor = row_scale(_OP, reduction, targets, None, ignore_index, num_items, loss_dtype(rows))
    factor = factor.expand(targets.shape).masked_fill(targets == ignore_index, 0)
    factor = factor if scale is None else scale.detach().reshape(-1) * factor
    keep = torch.is_grad_enabled() and reduction != "none" and rows.dtype != torch.float16
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    loss, *_ = dispatch(
        _OP,
        hidden=rows,
        weight=weight,
        bias=bias,
        teacher_hidden=given_rows,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        scale=factor,
        temperature=temperature,
        reverse=reverse,
        reduction="none" if reduction == "none" else "sum",
        hidden_grad=keep and rows.requires_grad if hidden_grad is None else hidden_grad,
        weight_grad=keep and trained if weight_grad is None else weight_grad,
    )
    return loss.view(labels.shape) if reduction == "none" else loss


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
) -> None:
    check_same_dtype(_OP, "hidden", hidden, weight=weight, bias=bias)
    check_same_dtype(_OP, "teacher_hidden", teacher_hidden, teacher_weight=teacher_weight, teacher_bias=teacher_bias)
    check_same_device(_OP, "hidden", hidden, weight=weight, bias=bias, teacher_hidden=teacher_hidden)
    check_same_device(_OP, "hidden", hidden, teacher_weight=teacher_weight, teacher_bias=teacher_bias)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"{_OP}: weight has shape {shape_text(weight.shape)}, expected [V, {hidden.shape[-1]}]")
    words = weight.shape[0]
    if words == 0:
        raise ValueError(f"{_OP}: there are 0 words to choose from, expected at least 1")
    check_shape(_OP, "bias", bias, (words,), "one number for each word")
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        expected = f"[{', '.join(map(str, hidden.shape[:-1]))}, G], the rows of hidden"
        raise ValueError(f"{_OP}: teacher_hidden has shape {shape_text(teacher_hidden.shape)}, expected {expected}")
    expected_shape = (words, teacher_hidden.shape[-1])
    check_shape(_OP, "teacher_weight", teacher_weight, expected_shape, "the student's words, the teacher's hidden size")
    check_shape(_OP, "teacher_bias", teacher_bias, (words,), "one number for each word")
    frozen = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias}
    for name, tensor in frozen.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{_OP}: {name} requires a gradient, expected a frozen teacher's")


def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    scale: Tensor,
    temperature: float,
    reverse: bool,
    reduction: str,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(() if reduction == "sum" else scale.shape, dtype=loss_dtype(hidden)),
        hidden.new_empty(hidden.shape if hidden_grad else 0),
        hidden.new_empty(weight.shape if weight_grad else 0),
        hidden.new_empty(bias.shape if weight_grad and bias is not None else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature, ctx.reverse, ctx.reduction, kept, weight_kept = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.kept = kept, weight_kept
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, scale, *gradients = ctx.saved_tensors

    def again(scale: Tensor, hidden_grad: bool, weight_grad: bool) -> list[Tensor]:
        _, *found = dispatch(
            _OP,
            hidden=hidden.detach(),
            weight=weight.detach(),
            bias=None if bias is None else bias.detach(),
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
            teacher_bias=teacher_bias,
            scale=scale,
            temperature=ctx.temperature,
            reverse=ctx.reverse,
            reduction="sum",
            hidden_grad=hidden_grad,
            weight_grad=weight_grad,
        )
        return found

    hint = "that of the divergence of the logits can"
    return *backward_of_linear_loss(_OP, ctx, dloss, scale, gradients, again, hint), *[None] * 9


# hidden [N, H], weight [V, H], teacher_hidden [N, G], teacher_weight [V, G], scale [N] in the dtype of the loss.  The
# loss is the sum of the rows' times `scale`, or each row's where reduction is "none"; rows whose scale is 0 are left
# out.  The gradients are those of the sum; they have 0 elements where they are not wanted.
define(
    "linear_kl_div(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight,"
    " Tensor? teacher_bias, Tensor scale, float temperature, bool reverse, str reduction, bool hidden_grad,"
    " bool weight_grad) -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
