from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.backends.cuda import _plan
from llmkern.backends.cuda._declare import serves
from llmkern.backends.cuda._heads import DTYPES, MAX_LENGTH, copies_of, refuse_heads


def _refuse(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None, sinks: Tensor | None, **_: Any
) -> str | None:
    capacity = k_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    if capacity > MAX_LENGTH:
        return f"the cache has room for {capacity} tokens of a sequence; at most {MAX_LENGTH} are taken"
    return refuse_heads(sinks, q=q, k_cache=k_cache, v_cache=v_cache)


def _copies(q: Tensor, k_cache: Tensor, v_cache: Tensor, **_: Any) -> str | None:
    return copies_of(q=q, k_cache=k_cache, v_cache=v_cache)


serves("attention_decode", dtypes=DTYPES, refuse=_refuse, describe=_plan.attention_decode, copies=_copies)
