from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkern import jax as twins
from llmkern.backends.tpu._attention import as_outputs
from llmkern.backends.tpu._declare import serves


@serves("attention", finish=as_outputs)
def attention(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any,
    key_padding_mask: Any,
    sinks: Any,
    causal: bool,
    sm_scale: float,
    window: Sequence[int],
    softcap: float,
    return_lse: bool,
) -> Any:
    return twins.attention(
        q,
        k,
        v,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        sinks=sinks,
        causal=causal,
        sm_scale=sm_scale,
        window=tuple(window),
        softcap=softcap,
        return_lse=return_lse,
    )
