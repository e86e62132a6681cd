from __future__ import annotations

from typing import Any

import torch

from llmkern.programs.program import Parameter, parse

_LINEARS = [*[f"self_attn.{name}_proj" for name in "qkvo"], *[f"mlp.{name}_proj" for name in ("gate", "up", "down")]]
LLAMA = """layer(hidden, cos, sin, mask)
  x = rms_norm(hidden, input_layernorm, eps=1e-06)
  q, k, v = linear(x, {0}, {1}, {2})
  q, k = rope(q, k, cos, sin, dim={dim})
  k, v = append(k, v)
  a = attention(q, k, v, mask, dim={dim}, scale={scale}, causal)
  h = linear(a, {3}, residual=hidden)
  y = rms_norm(h, post_attention_layernorm, eps=1e-06)
  g = linear(y, {4}, {5}, activation=swiglu)
  hidden = linear(g, {6}, residual=h)
  return hidden"""


def build(
    make: Any,
    B: int,
    S: int,
    past: int,
    H: int,
    Hq: int,
    Hkv: int,
    D: int,
    I: int,
    *,
    int8: bool = False,
    layers: int = 1,
    program: str = "",
) -> dict[str, Any]:
    """past: tokens in the cache, which has room for S more; int8: weights in int8; program: another than Llama's, of
    the same places."""
    text = str(parse(program or LLAMA.format(*_LINEARS, dim=D, scale=max(D, 1) ** -0.5)))
    into = (Hkv * D, H)
    sizes = dict(zip(_LINEARS, ((Hq * D, H), into, into, (H, Hq * D), (I, H), (I, H), (H, I)), strict=True))

    def tensors(parameter: Parameter) -> list[Any]:
        if parameter.kind != "linear":
            return [make.randn(H), None][: 2 if parameter.kind == "norm" else 1]
        size = sizes[parameter.path]
        if not int8:
            return [make.randn(*size), None, None]
        codes = make.randint(-127, 128, *size, dtype=torch.int8)
        return [codes, make.randn(size[0], 1, dtype=torch.float32), None]

    each = [parse(text).parameters() for _ in range(layers)]
    cache = (B, Hkv, past + S, D)
    return {
        "hidden": make.randn(B, S, H),
        "programs": [text],
        "parameters": [t for layer in each for parameter in layer for t in tensors(parameter)],
        "inputs": [make.randn(1, S, D), make.randn(1, S, D), None],
        "caches": [t for _ in each for t in (make.randn(*cache), make.randn(*cache))],
        "past": past,
    }
