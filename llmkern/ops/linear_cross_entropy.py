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
from llmkern.ops._linear_loss import LinearCrossEntropy, as_rows, define_linear_loss, run_linear_loss, under_autocast
from llmkern.ops._loss import LossOptions, check_labels, check_loss, loss_dtype, row_scale, wide_weight

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
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    rows, targets = as_rows(hidden), labels
    if isinstance(labels, Tensor):
        if labels.shape != hidden.shape[:-1]:
            expected = f"{shape_text(hidden.shape[:-1])} (the shape of hidden without its last dimension)"
            raise ValueError(f"{_OP}: labels has shape {shape_text(labels.shape)}, expected {expected}")
        targets = labels.reshape(-1)
    head: dict[str, Any] = {"hidden": rows, "weight": weight, "bias": bias, "weight_scale": weight_scale}
    _check(**head)
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    words = weight.shape[0]
    check_loss(_OP, "hidden", rows, words, targets, class_weight, options, weight_name="class_weight")
    check_labels(_OP, targets, words, ignore_index)
    check_shape(_OP, "scale", scale, labels.shape, "the shape of labels")
    check_same_device(_OP, "hidden", hidden, scale=scale)
    class_weight = wide_weight(class_weight, rows)
    factor = row_scale(_OP, reduction, targets, class_weight, ignore_index, num_items, loss_dtype(rows))
    factor = factor.expand(targets.shape) if scale is None else scale.detach().reshape(-1) * factor
    losses = {"labels": targets, "class_weight": class_weight, "scale": factor, **options._asdict()}
    return run_linear_loss(_OP, labels.shape, reduction, hidden_grad, weight_grad, **head, **losses)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, weight_scale: Tensor | None) -> None:
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


define_linear_loss(
    _OP,
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? weight_scale, Tensor labels, Tensor? class_weight,"
    " Tensor? scale, int ignore_index, float label_smoothing, float z_loss, float softcap, str reduction,"
    " bool hidden_grad, bool weight_grad",
    LinearCrossEntropy,
    "cross_entropy of the logits can",
)
