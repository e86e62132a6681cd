from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkern.backends.reference import REFERENCE
from llmkern.backends.reference.attention import attention
from llmkern.dispatch import implements


@implements("attention_decode", REFERENCE)
def attention_decode(
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
    k_cache, v_cache = stored(k_cache, k_scale, block_table), stored(v_cache, v_scale, block_table)
    dtype = torch.promote_types(q.dtype, k_cache.dtype)  # codes have scales in fp32, whatever q is
    k_cache, v_cache = k_cache.to(dtype), v_cache.to(dtype)
    slots = k_cache.shape[2]
    live = before_end(seq_lens, slots)
    k, v = torch.where(live, k_cache, 0), torch.where(live, v_cache, 0)
    mask = visible_slots(q.shape[2], slots, seq_lens, window)
    return attention(q, k, v, mask, None, sinks, False, sm_scale, (-1, -1), softcap, return_lse)


def stored(cache: Tensor, scale: Tensor | None, block_table: Tensor | None) -> Tensor:
    """The cache as [B, Hkv, slots, D], a paged one copied in order; int8 codes times their scale, in its dtype."""
    if block_table is not None:
        cache = in_order(cache, block_table)
        scale = None if scale is None else in_order(scale[..., None], block_table)[..., 0]
    return cache if scale is None else cache * scale[..., None]


def in_order(cache: Tensor, block_table: Tensor) -> Tensor:
    """A copy [B, Hkv, max_blocks · block_size, D] of the blocks that the table names; wild entries are clamped."""
    batch, max_blocks = block_table.shape
    _, heads, block_size, dim = cache.shape
    blocks = block_table.flatten().clamp(0, max(cache.shape[0] - 1, 0))
    # Gathered as [B · max_blocks, block_size, Hkv, D], consecutive blocks are consecutive positions: one copy only.
    gathered = cache.transpose(1, 2).index_select(0, blocks)
    return gathered.reshape(batch, max_blocks * block_size, heads, dim).transpose(1, 2)


def before_end(seq_lens: Tensor, slots: int) -> Tensor:
    """bool [B, 1, slots, 1]: the slots before each sequence's end."""
    return (torch.arange(slots, device=seq_lens.device) < seq_lens[:, None])[:, None, :, None]


def visible_slots(queries: int, slots: int, seq_lens: Tensor, window: Sequence[int]) -> Tensor:
    """bool [B, 1, queries, slots]: what each query sees, standing at position seq_lens − queries + i."""
    left, _ = window
    device = seq_lens.device
    position = seq_lens[:, None] - queries + torch.arange(queries, device=device)
    distance = torch.arange(slots, device=device) - position[:, :, None]
    visible = distance <= 0
    if left >= 0:
        visible = visible & (distance >= -left)
    return visible[:, None]
