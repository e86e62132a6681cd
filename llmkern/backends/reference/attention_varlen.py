from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmkern.backends.reference import REFERENCE
from llmkern.backends.reference.attention import attention
from llmkern.backends.reference.attention_decode import in_order
from llmkern.dispatch import implements
from llmkern.ops.attention_varlen import varlen_like


class Tokens(NamedTuple):
    """Hold each token's sequence [T], B for a token in none, and its position among the sequence's tokens [T]."""

    owner: Tensor
    position: Tensor


def packed(cu_seqlens: Tensor, count: int) -> Tokens:
    """Locate `count` tokens that lie behind each other."""
    ends = cu_seqlens.long()
    at = torch.arange(count, device=ends.device)
    owner = torch.searchsorted(ends[1:].contiguous(), at, right=True)
    owner = torch.where(at < ends[0], ends.shape[0] - 1, owner)
    return Tokens(owner, at - ends[owner])


def in_cache(seqused_k: Tensor, slots: int) -> Tokens:
    """Locate the tokens of a cache's slots, sequence by sequence; a slot past its sequence's end is in none."""
    batch = seqused_k.shape[0]
    position = torch.arange(slots, device=seqused_k.device).expand(batch, slots)
    owner = torch.arange(batch, device=seqused_k.device)[:, None].expand(batch, slots)
    return Tokens(torch.where(position < seqused_k[:, None], owner, batch).flatten(), position.flatten())


def lengths_of(cu_seqlens: Tensor) -> Tensor:
    """The sequences' lengths, and 0 for no sequence: int64 [B + 1]."""
    return torch.nn.functional.pad(cu_seqlens.long().diff(), (0, 1))


def cached(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """The cache as [B, slots, Hkv, D], a paged one copied in order."""
    return cache if block_table is None else in_order(cache.transpose(1, 2), block_table).transpose(1, 2)


def keys_of(
    k: Tensor, v: Tensor, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None, block_table: Tensor | None
) -> tuple[Tokens, Tensor, Tensor, Tensor]:
    """(where each key is, how many each sequence has, k, v), a cache's slots packed behind each other."""
    if seqused_k is None:
        assert cu_seqlens_k is not None
        return packed(cu_seqlens_k, k.shape[0]), lengths_of(cu_seqlens_k), k, v
    k, v = cached(k, block_table), cached(v, block_table)
    slots = k.shape[1]
    keys = torch.nn.functional.pad(seqused_k.long().clamp(0, slots), (0, 1))
    return in_cache(seqused_k, slots), keys, k.flatten(0, 1), v.flatten(0, 1)


def visible(q: Tokens, k: Tokens, queries: Tensor, keys: Tensor, causal: bool, window: Sequence[int]) -> Tensor:
    """bool [T, Tk]: the keys that each row sees; queries, keys: the sequences' lengths, 0 behind the last."""
    left, right = window
    distance = k.position - (q.position + (keys - queries)[q.owner])[:, None]
    seen = (q.owner[:, None] == k.owner) & (q.owner < queries.shape[0] - 1)[:, None]
    if causal:
        right = 0
    if left >= 0:
        seen = seen & (distance >= -left)
    return seen & (distance <= right) if right >= 0 else seen


@implements("attention_varlen", REFERENCE)
def attention_varlen(
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
    tokens, keys, k, v = keys_of(k, v, cu_seqlens_k, seqused_k, block_table)
    rows = packed(cu_seqlens_q, q.shape[0])
    mask = visible(rows, tokens, lengths_of(cu_seqlens_q), keys, causal, window)
    live = mask.any(0)[:, None, None]  # what no row sees may be NaN
    k, v = (torch.where(live, x, 0) for x in (k, v))
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
    out, lse = attention(*heads, mask[None, None], None, sinks, False, sm_scale, (-1, -1), softcap, return_lse)
    outside = rows.owner == cu_seqlens_q.shape[0] - 1
    out = out[0].transpose(0, 1).masked_fill(outside[:, None, None], 0).contiguous()
    return out, lse[0].masked_fill(outside, -math.inf) if return_lse else varlen_like(q, v, False)[1]
