"""Attention of packed sequences, of any number of queries each, against packed keys or a cache, contiguous or paged
(flash-attention's varlen form: Dao 2023, arXiv:2307.08691; pages: Kwon et al. 2023, arXiv:2309.06180)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from llmkern.checks import (
    check_dtype,
    check_flag,
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
    shape_text,
)
from llmkern.dispatch import dispatch
from llmkern.library import define
from llmkern.ops.attention import check_numbers, check_sinks, default_scale, window_of

__all__ = ["attention_varlen"]

_OP = "attention_varlen"


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = False,
    sm_scale: float | None = None,
    window: int | Sequence[int] | None = None,
    softcap: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = False,
    sm_scale: float | None = None,
    window: int | Sequence[int] | None = None,
    softcap: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = False,
    sm_scale: float | None = None,
    window: int | Sequence[int] | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of sequences packed behind each other: each one's queries see that sequence's keys only.

    q: [T, Hq, D], fp32, bf16, fp16 or fp64, any strides; the queries of sequence b are its rows cu_seqlens_q[b] up to
        cu_seqlens_q[b + 1], any number of them, 0 too.
    k: [Tk, Hkv, D], v: [Tk, Hkv, Dv], packed likewise by cu_seqlens_k; or with seqused_k a cache, [B, Smax, Hkv, D]
        and [B, Smax, Hkv, Dv], and with a block table beside it a paged one, [num_blocks, block_size, Hkv, D or Dv].
        Any strides; q's dtype.
    cu_seqlens_q, cu_seqlens_k: int32 [B + 1], contiguous, from 0 to T or Tk, never falling.
    seqused_k: int32 [B], contiguous: keys of each sequence in the cache, those of its queries included.  Either it or
        cu_seqlens_k is given.
    block_table: int32 [B, max_blocks]; block_table[b, p // block_size] holds position p.  Entries past the end of the
        sequence may hold anything; within it, entries outside 0 … num_blocks − 1 are clamped to it.
    sinks, causal, sm_scale, window, softcap: as for `attention`, sequence by sequence: a query stands at position
        i + keys − queries, so the last query stands at its sequence's last key.
    Returns out [T, Hq, Dv] in q's dtype, contiguous; with `return_lse` also the log-sum-exp of each row's scores,
    sinks included, [Hq, T] in fp32 (fp64 for fp64).

    A query that sees no key gets 0 and −inf (with sinks: 0, and the sink).  What lies past a sequence's end in a cache
    may be NaN: nothing of it reaches the result.  Rows of q outside every sequence get 0 and −inf.
    Lengths are never read on the host of a GPU: lengths that lead outside the tensors are the caller's mistake; they
    give wrong numbers but read nothing outside.
    On the CPU a sequence has the bits that it has alone, whatever is beside it and wherever it lies in the pack.
    No gradient.  Raises TypeError for other dtypes, ValueError for other shapes, devices or values.
    """
    out, lse = dispatch(
        _OP,
        _check,
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        block_table=block_table,
        sinks=sinks,
        causal=causal,
        sm_scale=default_scale(q) if sm_scale is None else sm_scale,
        window=window_of(_OP, window),
        softcap=0.0 if softcap is None else softcap,
        return_lse=return_lse,
    )
    return (out, lse) if return_lse else out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    sm_scale: float,
    softcap: float,
    return_lse: bool,
    **_: Any,
) -> None:
    check_flag(_OP, causal=causal, return_lse=return_lse)
    check_floating(_OP, q=q, k=k, v=v)
    if (cu_seqlens_k is None) == (seqused_k is None):
        given = "neither is" if seqused_k is None else "both are"
        raise ValueError(f"{_OP}: {given} given of cu_seqlens_k (packed keys) and seqused_k (a cache), expected one")
    if block_table is not None and seqused_k is None:
        raise ValueError(
            f"{_OP}: block_table is given beside cu_seqlens_k, expected seqused_k, a paged cache's lengths"
        )
    cached = 4 if cu_seqlens_k is None else 3
    for name, tensor, dims in (("q", q, 3), ("k", k, cached), ("v", v, cached)):
        if tensor.dim() != dims:
            raise ValueError(f"{_OP}: {name} has shape {shape_text(tensor.shape)}, expected {dims} dimensions")
    check_same_dtype(_OP, "q", q, k=k, v=v)
    check_same_device(_OP, "q", q, k=k, v=v)
    if q.shape[-1] == 0 or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{_OP}: k has head dimension {k.shape[-1]}, expected {max(q.shape[-1], 1)} (q's)")
    check_shape(_OP, "v", v, (*k.shape[:-1], v.shape[-1]), "that of k but for the last dimension")
    if k.shape[-2] == 0 or q.shape[1] % k.shape[-2]:
        raise ValueError(f"{_OP}: q has {q.shape[1]} heads, expected a multiple of k's {k.shape[-2]}")
    batch = _check_lengths(q, "cu_seqlens_q", cu_seqlens_q, None)
    if cu_seqlens_k is not None:
        _check_lengths(q, "cu_seqlens_k", cu_seqlens_k, batch + 1)
    if seqused_k is not None:
        _check_lengths(q, "seqused_k", seqused_k, batch)
        _check_cache(q, k, block_table, batch)
    check_sinks(_OP, q, sinks)
    check_numbers(_OP, sm_scale, softcap)


def _check_lengths(q: Tensor, name: str, lengths: Tensor, count: int | None) -> int:
    """Check that `lengths` is contiguous int32 on q's device, of `count` elements, or of one at least; return B."""
    check_dtype(_OP, name, lengths, torch.int32)
    check_same_device(_OP, "q", q, **{name: lengths})
    expected = "[B + 1]" if count is None else f"[{count}] (cu_seqlens_q has {count - (name != 'seqused_k')} sequences)"
    if lengths.dim() != 1 or lengths.shape[0] != (max(lengths.shape[0], 1) if count is None else count):
        raise ValueError(f"{_OP}: {name} has shape {shape_text(lengths.shape)}, expected {expected}")
    if not lengths.is_contiguous():
        raise ValueError(f"{_OP}: {name} has stride {lengths.stride(0)}, expected 1")
    return lengths.shape[0] - 1


def _check_cache(q: Tensor, k: Tensor, block_table: Tensor | None, batch: int) -> None:
    if block_table is None:
        if k.shape[0] != batch:
            raise ValueError(
                f"{_OP}: k has batch size {k.shape[0]}, expected {batch} (cu_seqlens_q's); "
                "a paged cache needs a block_table"
            )
        return
    check_dtype(_OP, "block_table", block_table, torch.int32)
    check_same_device(_OP, "q", q, block_table=block_table)
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise ValueError(
            f"{_OP}: block_table has shape {shape_text(block_table.shape)}, "
            f"expected [{batch}, max_blocks] (cu_seqlens_q's batch)"
        )
    if 0 in k.shape[:2] and block_table.numel() > 0:
        raise ValueError(f"{_OP}: k has shape {shape_text(k.shape)}, expected blocks with slots beside a block_table")


def varlen_like(q: Tensor, v: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Allocate out [T, Hq, Dv] and the log-sum-exp [Hq, T]; that has 0 elements if none is wanted."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows, heads, _ = q.shape
    return q.new_empty((rows, heads, v.shape[-1])), q.new_empty((heads, rows) if return_lse else 0, dtype=dtype)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    sm_scale: float,
    window: Sequence[int],
    softcap: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    return varlen_like(q, v, return_lse)


# window is [left, right], -1 for no limit; causal limits right to 0 besides.  softcap 0: no cap.  Without return_lse
# the second result has 0 elements.
define(
    "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k,"
    " Tensor? block_table, Tensor? sinks, bool causal, float sm_scale, int[] window, float softcap, bool return_lse)"
    " -> (Tensor out, Tensor lse)",
    fake=_fake,
)
