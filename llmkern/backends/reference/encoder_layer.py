from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from llmkern.backends.reference import REFERENCE, accumulate
from llmkern.backends.reference.attention import attention
from llmkern.backends.reference.decoder_layer_ import linear
from llmkern.backends.reference.layer_norm import layer_norm
from llmkern.dispatch import implements
from llmkern.ops.int8_matmul import activate


@implements("encoder_layer", REFERENCE)
def encoder_layer(
    hidden: Tensor,
    mask: Tensor | None,
    attention_norm: Tensor,
    attention_norm_bias: Tensor | None,
    output_norm: Tensor,
    output_norm_bias: Tensor | None,
    heads: int,
    eps: float,
    sm_scale: float,
    activation: str,
    scheme: str,
    **linears: Any,
) -> Tensor:
    project = partial(linear, linears, scheme.split(","))

    q, k, v = (project(hidden, name).unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qkv")
    out, _ = attention(q, k, v, mask, None, None, False, sm_scale, [-1, -1], 0.0, False)
    attended = project(out.transpose(1, 2).flatten(2), "o")
    h = layer_norm(hidden + attended, attention_norm, attention_norm_bias, eps)
    inner = project(h, "up")
    down = project(activate(accumulate(inner), activation).to(inner.dtype), "down")
    return layer_norm(h + down, output_norm, output_norm_bias, eps)
