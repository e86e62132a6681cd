from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.reference import REFERENCE, accumulate
from llmkern.backends.reference.attention import attention
from llmkern.backends.reference.gelu import gelu
from llmkern.backends.reference.int8_linear import int8_linear
from llmkern.backends.reference.quantize_int8 import quantize_int8
from llmkern.backends.reference.rms_norm import rms_norm
from llmkern.backends.reference.rope import rope
from llmkern.backends.reference.swiglu import swiglu
from llmkern.dispatch import implements


def linear(linears: dict[str, Any], schemes: list[str], x: Tensor, name: str) -> Tensor:
    """x · weightᵀ + bias in the dtype of x, by the linear layer of that name, floating point or int8.

    linears: an op's arguments <name>_weight, <name>_scale and <name>_bias, in order.
    schemes: of int8 weights, one for all of them, or one for each.
    """
    weight, scale, bias = (linears[f"{name}_{part}"] for part in ("weight", "scale", "bias"))
    if scale is not None:
        names = [key.removesuffix("_weight") for key in linears if key.endswith("_weight")]
        return int8_linear(x, weight, scale, bias, "none", schemes[names.index(name) if len(schemes) > 1 else 0])
    xf = accumulate(x)
    return F.linear(xf, weight.to(xf.dtype), None if bias is None else bias.to(xf.dtype)).to(x.dtype)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up."""
    if activation == "silu":
        return swiglu(gate, up)
    return gelu(gate, "tanh" if activation == "gelu_tanh" else "none") * up


@implements("decoder_layer_", REFERENCE)
def decoder_layer_(
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    k_cache_scale: Tensor | None,
    v_cache_scale: Tensor | None,
    past: int,
    mask: Tensor | None,
    input_norm: Tensor,
    post_norm: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    head_dim: int,
    eps: float,
    norm_offset: float,
    interleaved: bool,
    sm_scale: float,
    window: int,
    softcap: float,
    activation: str,
    scheme: str,
    **linears: Any,
) -> Tensor:
    project = partial(linear, linears, scheme.split(","))

    def heads(x: Tensor, name: str, norm: Tensor | None) -> Tensor:
        projected = project(x, name).unflatten(-1, (-1, head_dim))
        return (projected if norm is None else rms_norm(projected, norm, None, eps, norm_offset)).transpose(1, 2)

    x = rms_norm(hidden, input_norm, None, eps, norm_offset)
    q, k, v = heads(x, "q", q_norm), heads(x, "k", k_norm), heads(x, "v", None)
    q, k = rope(q, k, cos, sin, cos.shape[-1], interleaved)
    if k_cache is not None and v_cache is not None:
        k = append(k_cache, k_cache_scale, past, k)
        v = append(v_cache, v_cache_scale, past, v)
    limits = [-1 if window < 0 or mask is not None else window - 1, -1]
    out, _ = attention(q, k, v, mask, None, None, mask is None, sm_scale, limits, softcap, False)
    total = hidden + project(out.transpose(1, 2).flatten(2), "o")
    x = rms_norm(total, post_norm, None, eps, norm_offset)
    return (total + project(gated(project(x, "gate"), project(x, "up"), activation), "down")).contiguous()


def append(cache: Tensor, scale: Tensor | None, past: int, new: Tensor) -> Tensor:
    """Writes `new` at `past`; returns what is attended to, in new's dtype."""
    end = past + new.shape[2]
    if scale is None:
        cache[:, :, past:end] = new
        return cache[:, :, :end]
    cache[:, :, past:end], new_scale = quantize_int8(new)
    scale[:, :, past:end] = new_scale.squeeze(-1)
    if past == 0:
        return new
    dtype = torch.float64 if new.dtype == torch.float64 else torch.float32
    return (cache[:, :, :end] * scale[:, :, :end, None].to(dtype)).to(new.dtype)
