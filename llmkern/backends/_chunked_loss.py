"""A head and its loss over chunks of rows: what kernels of the loss itself have in common, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmkern.ops._linear_loss import LinearCrossEntropy, LinearJsd, Outputs
from llmkern.ops._loss import loss_dtype

__all__ = ["CHUNK_BYTES", "linear_loss"]

CHUNK_BYTES = 2**25
"""Most bytes of a chunk's logits; a chunk has at least 16 rows."""
WORDS_AT_ONCE = 8192
"""Words of an int8 weight that are widened, and of a half-precision gradient that are added in fp32, at a time."""

RowLoss = Callable[[Tensor, tuple[Tensor, ...], Tensor], Tensor]
"""Takes logits [n, V], targets [n, ...] and scales [n]; returns the losses [n], and leaves the gradients of the losses
times `scales` in the logits' place."""


def linear_loss(
    call: LinearCrossEntropy | LinearJsd,
    targets: tuple[Tensor, ...],
    counts: Tensor,
    row_loss: RowLoss,
    weight_scale: Tensor | None = None,
) -> Outputs:
    """Return loss, dhidden, dweight and dbias, the loss of a chunk's logits being computed by `row_loss`.

    targets: what `row_loss` compares the rows with, [N, ...] each.  Rows that do not count, by `counts` [N], are left
    out on the CPU; on other devices `row_loss` sees them: to find them would wait for the device.
    """
    hidden, weight, bias = call.hidden, call.weight, call.bias
    rows, words = hidden.shape[0], weight.shape[0]
    kept = None
    if hidden.is_cpu:
        kept = counts.nonzero()[:, 0]
        kept = None if kept.numel() == rows else kept
    scale = torch.ones(rows, dtype=loss_dtype(hidden), device=hidden.device) if call.scale is None else call.scale
    total = rows if kept is None else kept.numel()
    none = hidden.new_empty(0)
    losses = hidden.new_zeros(rows, dtype=loss_dtype(hidden))
    make = torch.empty_like if kept is None else torch.zeros_like
    dhidden = make(hidden, memory_format=torch.contiguous_format) if call.hidden_grad else none
    sums = _Sums(hidden, weight, bias) if call.weight_grad else None
    count = max(16, CHUNK_BYTES // (words * hidden.element_size()))
    buffer = hidden.new_empty(min(count, total), words)
    for start in range(0, total, count):
        chunk = slice(start, start + count)
        at = chunk if kept is None else kept[chunk]
        part, factors = hidden[at], scale[at].contiguous()
        logits = buffer[: part.shape[0]]
        for first, block in _blocks(weight, weight_scale, hidden.dtype):
            columns = logits[:, first : first + block.shape[0]]
            torch.mm(part, block.T, out=columns)
        if bias is not None:
            logits += bias
        losses[at] = row_loss(logits, tuple([t[at] for t in targets]), factors) * factors
        if call.hidden_grad:
            dhidden[at] = _times_weight(logits, weight, weight_scale)
        if sums is not None:
            sums.add(logits, part)
    dweight, dbias = (none.clone(), none.clone()) if sums is None else sums.gradients()
    return losses.sum() if call.reduction == "sum" else losses, dhidden, dweight, dbias


def _blocks(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> list[tuple[int, Tensor]] | _Widened:
    return [(0, weight)] if scale is None else _Widened(weight, scale, dtype)


class _Widened:
    """An int8 weight, some words at a time in a floating dtype."""

    def __init__(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.scale, self.dtype = weight, scale, dtype

    def __iter__(self):  # type: ignore[no-untyped-def]
        for first in range(0, self.weight.shape[0], WORDS_AT_ONCE):
            words = slice(first, first + WORDS_AT_ONCE)
            yield first, (self.weight[words] * self.scale[words]).to(self.dtype)


def _times_weight(gradient: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """Return gradient · weight; the blocks of an int8 weight are added up in fp32."""
    if scale is None:
        return gradient @ weight
    total = gradient.new_zeros(gradient.shape[0], weight.shape[1], dtype=loss_dtype(gradient))
    for first, block in _blocks(weight, scale, gradient.dtype):
        total += gradient[:, first : first + block.shape[0]] @ block
    return total.to(gradient.dtype)


class _Sums:
    """The gradients of weight and bias, summed over chunks in fp32."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.dtype, self.like, self.bias = hidden.dtype, weight, bias
        self.dweight: Tensor | None = None
        self.dbias = None if bias is None else hidden.new_zeros(bias.shape, dtype=loss_dtype(hidden))

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        wide = loss_dtype(hidden)
        if self.dweight is None:
            self.dweight = hidden.new_zeros(self.like.shape, dtype=wide)
        if hidden.dtype == wide:
            self.dweight.addmm_(gradient.T, hidden)
        else:
            for first in range(0, gradient.shape[1], WORDS_AT_ONCE):
                words = slice(first, first + WORDS_AT_ONCE)
                self.dweight[words] += gradient[:, words].T @ hidden
        if self.dbias is not None:
            self.dbias += gradient.sum(0, dtype=wide)

    def gradients(self) -> tuple[Tensor, Tensor]:
        dweight = self.like.new_zeros(self.like.shape) if self.dweight is None else self.dweight
        none = dweight.new_empty(0, dtype=self.dtype)
        return dweight.to(self.dtype), none if self.dbias is None else self.dbias.to(self.dtype)
