from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkern.backends.reference.attention_decode import before_end, stored, visible_slots
from llmkern.backends.torch import TORCH
from llmkern.backends.torch.attention import attention, refuse_lse
from llmkern.dispatch import implements

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@implements("attention_decode", TORCH, refuse=refuse_lse)
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
    k_cache = stored(k_cache, k_scale, block_table).to(q.dtype)
    v_cache = stored(v_cache, v_scale, block_table).to(q.dtype)
    slots = k_cache.shape[2]
    mask = visible_slots(q.shape[2], slots, seq_lens, window)
    # A mask alone would let a NaN in an unused slot through as 0 · NaN.  Clearing the slots' bits costs no more than a
    # plain copy of the cache; torch.where and masked_fill cost seven times that, being slow on a condition per row.
    bits = BITS[q.dtype.itemsize]
    keep = -before_end(seq_lens, slots).to(bits)
    k, v = ((cache.view(bits) & keep).view(q.dtype) for cache in (k_cache, v_cache))
    return attention(q, k, v, mask, None, sinks, False, sm_scale, (-1, -1), softcap, return_lse)
