"""Checks of the losses, and the count that a mean divides by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from llmkern.checks import (
    check_choice,
    check_dtype,
    check_finite,
    check_floating,
    check_is_number,
    check_non_negative,
    check_same_device,
    check_shape,
)

__all__ = ["LossOptions", "check_labels", "check_loss", "loss_dtype", "row_scale", "wide_weight"]

REDUCTIONS = ("mean", "sum", "none")


class LossOptions(NamedTuple):
    """Numbers of a cross-entropy, in the order of the schemas."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float


def loss_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that losses of x are computed and returned in: fp32, and fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_loss(
    op: str,
    lead_name: str,
    lead: Tensor,
    words: int,
    labels: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    weight_name: str = "weight",
) -> None:
    """Check labels [N] in int64 beside `lead` [N, ...], class weights [words] and the numbers."""
    check_dtype(op, "labels", labels, torch.int64)
    check_shape(op, "labels", labels, lead.shape[:1], f"one for each row of {lead_name}")
    check_same_device(op, lead_name, lead, labels=labels, **{weight_name: weight})
    if words == 0:
        raise ValueError(f"{op}: there are 0 words to choose from, expected at least 1")
    if weight is not None:
        check_floating(op, **{weight_name: weight})
        check_shape(op, weight_name, weight, (words,), "one number for each word")
    check_non_negative(op, "label_smoothing", options.label_smoothing)
    if options.label_smoothing > 1:
        raise ValueError(f"{op}: label_smoothing is {options.label_smoothing}, expected a number from 0 to 1")
    check_finite(op, "z_loss", options.z_loss)
    check_non_negative(op, "softcap", options.softcap)


def check_labels(op: str, labels: Tensor, words: int, ignore_index: int) -> None:
    """Check that each label is a word or ignored.  Only on the CPU: elsewhere it would wait for the device, and a label
    out of range makes the loss NaN."""
    if not labels.is_cpu or is_compiling() or type(labels) is not Tensor:
        return
    wrong = ((labels < 0) | (labels >= words)) & (labels != ignore_index)
    if bool(wrong.any()):
        first = int(labels[wrong][0])
        raise ValueError(f"{op}: labels has {first}, expected 0 to {words - 1} or {ignore_index} (ignore_index)")


def wide_weight(weight: Tensor | None, lead: Tensor) -> Tensor | None:
    """Return the class weights in the dtype of the loss, without a gradient."""
    return None if weight is None else weight.detach().to(loss_dtype(lead))


def row_scale(
    op: str,
    reduction: str,
    labels: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    num_items: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the factor, a number without dimensions, of each row's loss in the whole.

    weight: as of `wide_weight`.  Where nothing is left to count, 0 is divided by 1.
    """
    check_choice(op, "reduction", reduction, REDUCTIONS)
    one = labels.new_ones((), dtype=dtype)
    if num_items is not None:
        if reduction != "mean":
            raise ValueError(f'{op}: num_items is given with reduction={reduction!r}, expected reduction="mean"')
        if not isinstance(num_items, Tensor):
            check_is_number(op, "num_items", num_items)
        return one / num_items
    if reduction != "mean":
        return one
    kept = labels != ignore_index
    if weight is None:
        count = kept.sum().to(dtype)
    else:
        in_range = labels.clamp(0, weight.shape[0] - 1)
        count = torch.where(kept, weight[in_range], 0).sum()
    return one / torch.where(count == 0, one, count)
