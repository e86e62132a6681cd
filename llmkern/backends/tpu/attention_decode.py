from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkern import jax as twins
from llmkern.backends.tpu._attention import as_outputs
from llmkern.backends.tpu._declare import serves


@serves("attention_decode", finish=as_outputs)
def attention_decode(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    seq_lens: Any,
    block_table: Any,
    k_scale: Any,
    v_scale: Any,
    sinks: Any,
    sm_scale: float,
    window: Sequence[int],
    softcap: float,
    return_lse: bool,
) -> Any:
    return twins.attention_decode(
        q,
        k_cache,
        v_cache,
        seq_lens,
        block_table=block_table,
        k_scale=k_scale,
        v_scale=v_scale,
        sinks=sinks,
        sm_scale=sm_scale,
        window=tuple(window),
        softcap=softcap,
        return_lse=return_lse,
    )
