"""The output head and the cross-entropy of its logits, which are never in memory all at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.checks import (
    check_dtype,
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
from llmkern.ops._loss import backward_of_linear_loss, check_labels, check_loss, loss_dtype, row_scale, wide_weight

__all__ = ["linear_cross_entropy"]

_OP = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    weight_scale: Tensor | None = None,
    class_weight: Tensor | None = None,
    scale: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    hidden_grad: bool | None = None,
    weight_grad: bool | None = None,
) -> Tensor:
    """`cross_entropy(hidden · weightᵀ + bias, labels)`, a chunk of rows at a time.

    The logits of a chunk give way to their gradient, which is multiplied with the weight and the hidden states at
    once: three products of matrices in all, and no more memory than one chunk's, whatever the rows and words.

    hidden: [..., H], fp32, bf16, fp16 or fp64, any strides.  labels: int64, hidden's shape without H.
    weight: [V, H] and bias: [V], in hidden's dtype; a tied embedding's weight is one.  Or weight in int8 with
        weight_scale [V, 1] in fp32, which has no gradient.
    class_weight, ignore_index, label_smoothing, z_loss, softcap, reduction, num_items: as weight and the others of
        `cross_entropy`.
    scale: a factor of each row's loss, such as an advantage; labels' shape, in the dtype of the loss, no gradient.
    hidden_grad, weight_grad: compute the gradients of hidden, and of weight and bias, in the forward pass.  None where
        they are needed; but with "none", and in fp16, whose small gradients a scaled loss has to lift first, the
        logits are computed again in the backward pass.
    Under autocast hidden, weight and bias are cast as those of a linear layer.
    Returns the loss in fp32 (fp64 for fp64).  Differentiable, once, in hidden, weight and bias.
    Raises TypeError for other dtypes, ValueError for other shapes, devices or values, as `cross_entropy` does.
    """
    check_floating(_OP, hidden=hidden, **given(bias=bias))
    check_has_hidden(_OP, "hidden", hidden)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, bias = hidden.to(dtype), None if bias is None else bias.to(dtype)
        weight = weight.to(dtype) if isinstance(weight, Tensor) and weight.is_floating_point() else weight
    rows, targets = hidden.reshape(-1, hidden.shape[-1]) if hidden.numel() else hidden.flatten(0, -2), labels
    if isinstance(labels, Tensor):
        if labels.shape != hidden.shape[:-1]:
            expected = f"{shape_text(hidden.shape[:-1])} (the shape of hidden without its last dimension)"
            raise ValueError(f"{_OP}: labels has shape {shape_text(labels.shape)}, expected {expected}")
        targets = labels.reshape(-1)
    _check(rows, weight, targets, bias, weight_scale, class_weight, label_smoothing, z_loss, softcap)
    check_labels(_OP, targets, weight.shape[0], ignore_index)
    check_shape(_OP, "scale", scale, labels.shape, "the shape of labels")
    check_same_device(_OP, "hidden", hidden, scale=scale)
    class_weight = wide_weight(class_weight, rows)
    factor = row_scale(_OP, reduction, targets, class_weight, ignore_index, num_items, loss_dtype(rows))
    factor = factor.expand(targets.shape) if scale is None else scale.detach().reshape(-1) * factor
    keep = torch.is_grad_enabled() and reduction != "none" and rows.dtype != torch.float16
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    loss, *_ = dispatch(
        _OP,
        hidden=rows,
        weight=weight,
        bias=bias,
        weight_scale=weight_scale,
        labels=targets,
        class_weight=class_weight,
        scale=factor,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction="none" if reduction == "none" else "sum",
        hidden_grad=keep and rows.requires_grad if hidden_grad is None else hidden_grad,
        weight_grad=keep and trained if weight_grad is None else weight_grad,
    )
    return loss.view(labels.shape) if reduction == "none" else loss


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    if weight_scale is None:
        check_floating(_OP, weight=weight)
        check_same_dtype(_OP, "hidden", hidden, weight=weight, bias=bias)
    else:
        check_dtype(_OP, "weight", weight, torch.int8)
        check_dtype(_OP, "weight_scale", weight_scale, torch.float32)
        check_same_dtype(_OP, "hidden", hidden, bias=bias)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"{_OP}: weight has shape {shape_text(weight.shape)}, expected [V, {hidden.shape[1]}]")
    words = weight.shape[0]
    check_shape(_OP, "bias", bias, (words,), "one number for each word")
    check_shape(_OP, "weight_scale", weight_scale, (words, 1), "one number for each word")
    check_same_device(_OP, "hidden", hidden, weight=weight, bias=bias, weight_scale=weight_scale)
    numbers = (label_smoothing, z_loss, softcap)
    check_loss(_OP, "hidden", hidden, words, labels, class_weight, *numbers, weight_name="class_weight")


def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(() if reduction == "sum" else labels.shape, dtype=loss_dtype(hidden)),
        hidden.new_empty(hidden.shape if hidden_grad else 0),
        hidden.new_empty(weight.shape if weight_grad else 0),
        hidden.new_empty(bias.shape if weight_grad and bias is not None else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.ignore_index, ctx.label_smoothing, ctx.z_loss, ctx.softcap, ctx.reduction, kept, weight_kept = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.kept = kept, weight_kept
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, weight_scale, labels, class_weight, scale, *gradients = ctx.saved_tensors

    def again(scale: Tensor, hidden_grad: bool, weight_grad: bool) -> list[Tensor]:
        _, *found = dispatch(
            _OP,
            hidden=hidden.detach(),
            weight=weight.detach(),
            bias=None if bias is None else bias.detach(),
            weight_scale=weight_scale,
            labels=labels,
            class_weight=class_weight,
            scale=scale,
            ignore_index=ctx.ignore_index,
            label_smoothing=ctx.label_smoothing,
            z_loss=ctx.z_loss,
            softcap=ctx.softcap,
            reduction="sum",
            hidden_grad=hidden_grad,
            weight_grad=weight_grad,
        )
        return found

    hint = "cross_entropy of the logits can"
    return *backward_of_linear_loss(_OP, ctx, dloss, scale, gradients, again, hint), *[None] * 11


# hidden [N, H], weight [V, H], labels [N], scale [N] and class_weight [V] in the dtype of the loss.  The loss is the
# sum of the rows' times `scale`, or each row's where reduction is "none"; the gradients are those of the sum.  They
# have 0 elements where they are not wanted.
define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor? weight_scale, Tensor labels,"
    " Tensor? class_weight, Tensor? scale, int ignore_index, float label_smoothing, float z_loss, float softcap,"
    " str reduction, bool hidden_grad, bool weight_grad)"
    " -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
