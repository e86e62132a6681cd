"""Attention of the newest tokens against a cache, contiguous or paged (vLLM: Kwon et al. 2023, arXiv:2309.06180)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from llmkern.checks import check_dtype, check_flag, check_same_device, check_shape, shape_text
from llmkern.dispatch import dispatch
from llmkern.library import define
from llmkern.ops.attention import check_heads, check_numbers, check_sinks, default_scale, lse_like, out_like, window_of

__all__ = ["attention_decode"]

MAX_QUERIES = 16


@overload
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    sm_scale: float | None = None,
    window: int | Sequence[int] | None = None,
    softcap: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    sm_scale: float | None = None,
    window: int | Sequence[int] | None = None,
    softcap: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    sm_scale: float | None = None,
    window: int | Sequence[int] | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of each sequence's last Sq tokens, whose keys and values are in the cache already.

    q: [B, Hq, Sq, D] with 1 <= Sq <= 16, fp32, bf16, fp16 or fp64, any strides; query i of sequence b stands at
        position seq_lens[b] − Sq + i and sees the positions up to its own.
    k_cache: [B, Hkv, Smax, D], v_cache: [B, Hkv, Smax, Dv], q's dtype, or int8 with scales; with a block table
        [num_blocks, Hkv, block_size, D or Dv].  Any strides: vLLM's [num_blocks, block_size, Hkv, D] passes as
        `cache.transpose(1, 2)`.
    seq_lens: int32 or int64 [B], tokens in the cache including the Sq new ones.  Never read on the host: lengths
        outside 0 … capacity are the caller's mistake; they give wrong numbers but read nothing outside the cache.
    k_scale, v_scale: fp32 [B, Hkv, Smax], or [num_blocks, Hkv, block_size] with a block table, any strides: the caches
        are then int8 codes, a key is its code times its scale, and a value likewise (what `quantize_int8` makes of the
        heads of new tokens).  Both or neither.
    block_table: int32 [B, max_blocks]; block_table[b, p // block_size] holds position p.  Entries past the end of the
        sequence may hold anything; within it, entries outside 0 … num_blocks − 1 are clamped to it.
    sinks, sm_scale, softcap: as for `attention`.
    window: as for `attention`; its right side hides nothing that causality does not.
    Returns out [B, Hq, Sq, Dv] in q's dtype, in the memory order [B, Sq, Hq, Dv]; with `return_lse` also the
    log-sum-exp of each row's scores, sinks included, [B, Hq, Sq] in fp32 (fp64 for fp64).

    A query before its sequence's start (all of them where seq_lens[b] is 0) gets 0 and −inf (with sinks: 0, and the
    sink).  Slots past seq_lens[b] may hold anything, NaN too: nothing of them reaches the result.
    On the CPU a query has the bits that it has alone: whatever sequences are beside it, and without a window whatever
    queries, so that speculative decoding chooses the tokens that greedy decoding chooses.
    No gradient.  Raises TypeError for other dtypes, ValueError for other shapes, devices or values.
    """
    out, lse = dispatch(
        "attention_decode",
        _check,
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        seq_lens=seq_lens,
        block_table=block_table,
        k_scale=k_scale,
        v_scale=v_scale,
        sinks=sinks,
        sm_scale=default_scale(q) if sm_scale is None else sm_scale,
        window=window_of("attention_decode", window),
        softcap=0.0 if softcap is None else softcap,
        return_lse=return_lse,
    )
    return (out, lse) if return_lse else out


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    sinks: Tensor | None,
    sm_scale: float,
    softcap: float,
    return_lse: bool,
    **_: Any,
) -> None:
    op = "attention_decode"
    check_flag(op, return_lse=return_lse)
    codes = k_scale is not None or v_scale is not None
    if not codes and isinstance(k_cache, Tensor) and k_cache.dtype == torch.int8:
        raise TypeError(f"{op}: k_cache is torch.int8, expected q's dtype, or k_scale and v_scale beside int8 caches")
    check_heads(op, q, k_cache, v_cache, "k_cache", "v_cache", codes=codes)
    batch, queries = q.shape[0], q.shape[2]
    if not 1 <= queries <= MAX_QUERIES:
        raise ValueError(f"{op}: q has {queries} queries, expected 1 to {MAX_QUERIES}; use attention for more")
    check_dtype(op, "seq_lens", seq_lens, torch.int32, torch.int64)
    check_shape(op, "seq_lens", seq_lens, (batch,), "q's batch")
    check_same_device(op, "q", q, seq_lens=seq_lens)
    if block_table is not None:
        _check_block_table(q, k_cache, block_table)
    elif k_cache.shape[0] != batch:
        raise ValueError(
            f"{op}: k_cache has batch size {k_cache.shape[0]}, expected {batch} (q's); "
            "a paged cache needs a block_table"
        )
    if codes:
        _check_scale("k", q, k_cache, k_scale)
        _check_scale("v", q, v_cache, v_scale)
    check_sinks(op, q, sinks)
    check_numbers(op, sm_scale, softcap)


def _check_scale(name: str, q: Tensor, cache: Tensor, scale: Tensor | None) -> None:
    """Check that `scale` is given, fp32, on q's device, one number for each vector of the cache."""
    op = "attention_decode"
    if scale is None:
        raise ValueError(f"{op}: {name}_scale is None, expected one beside the other: both or neither")
    check_dtype(op, f"{name}_scale", scale, torch.float32)
    check_shape(op, f"{name}_scale", scale, cache.shape[:3], f"{name}_cache's but for the last dimension")
    check_same_device(op, "q", q, **{f"{name}_scale": scale})


def _check_block_table(q: Tensor, k_cache: Tensor, block_table: Tensor) -> None:
    check_dtype("attention_decode", "block_table", block_table, torch.int32)
    check_same_device("attention_decode", "q", q, block_table=block_table)
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
        raise ValueError(
            f"attention_decode: block_table has shape {shape_text(block_table.shape)}, "
            f"expected [{q.shape[0]}, max_blocks] (q's batch)"
        )
    if k_cache.shape[0] == 0 and block_table.numel() > 0:
        raise ValueError("attention_decode: k_cache has 0 blocks, expected at least 1 for a block_table with entries")


def _fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    sinks: Tensor | None,
    sm_scale: float,
    window: Sequence[int],
    softcap: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    return out_like(q, v_cache), lse_like(q, return_lse)


# window is [left, right], -1 for no limit; right is without effect.  softcap 0: no cap.  Without return_lse the second
# result has 0 elements.
define(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens, Tensor? block_table, Tensor? k_scale,"
    " Tensor? v_scale, Tensor? sinks, float sm_scale, int[] window, float softcap, bool return_lse)"
    " -> (Tensor out, Tensor lse)",
    fake=_fake,
)
