from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from llmkern.testing.case import Call, Make, each_dtype
from llmkern.testing.cases._layer import left_padding, linear

_OP = "decoder_layer_"


def _call(
    make: Make,
    queries: int,
    past: int = 0,
    *,
    batch: int = 1,
    hidden: int = 24,
    heads: tuple[int, int] = (4, 2),
    dim: int = 8,
    inner: int = 40,
    cached: bool = True,
    spare: int = 3,
    int8: bool | tuple[str, ...] = False,
    int8_cache: bool = False,
    biases: tuple[str, ...] = (),
    head_norms: bool = False,
    rotary_dim: int | None = None,
    packed: bool = False,
    scheme: str = "w8a8",
    **options: object,
) -> Call:
    """int8: all weights, or those named.  packed: q, k and v are rows of one weight, gate and up of another."""
    (q_heads, kv_heads), width = heads, rotary_dim or dim
    sizes = {
        "q": (q_heads * dim, hidden),
        "k": (kv_heads * dim, hidden),
        "v": (kv_heads * dim, hidden),
        "o": (hidden, q_heads * dim),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    linears: Call = {}
    for name, size in sizes.items():
        quantized = int8 if isinstance(int8, bool) else name in int8
        linears |= linear(make, name, *size, int8=quantized, bias=name in biases)
    if packed:
        for names in (("q", "k", "v"), ("gate", "up")):
            weight = torch.cat([linears[f"{n}_weight"] for n in names])
            rows = weight.split([sizes[n][0] for n in names])
            linears |= {f"{n}_weight": part for n, part in zip(names, rows, strict=True)}
    angles = make.randn(batch if past % 2 else 1, queries, width, dtype=torch.float32)
    call: Call = {
        "hidden": make.randn(batch, queries, hidden),
        "cos": angles.cos().to(make.dtype),
        "sin": angles.sin().to(make.dtype),
        "k_cache": None,
        "v_cache": None,
        "k_cache_scale": None,
        "v_cache_scale": None,
        "past": past,
        "mask": None,
        "input_norm": make.randn(hidden, scale=0.3, offset=1.0),
        "post_norm": make.randn(hidden, scale=0.3, offset=1.0),
        "q_norm": make.randn(dim, scale=0.3, offset=1.0) if head_norms else None,
        "k_norm": make.randn(dim, scale=0.3, offset=1.0) if head_norms else None,
        **linears,
        "head_dim": dim,
        "eps": 1e-5,
        "norm_offset": 0.0,
        "interleaved": False,
        "sm_scale": dim**-0.5,
        "window": -1,
        "softcap": 0.0,
        "activation": "silu",
        "scheme": scheme,
    }
    shape = (batch, kv_heads, past + queries + spare, dim)
    for name in ("k_cache", "v_cache") if cached else ():
        if int8_cache:
            call[name] = make.randint(-127, 128, *shape, dtype=torch.int8)
            call[f"{name}_scale"] = make.randn(*shape[:3], dtype=torch.float32, scale=2e-3, offset=1e-2).abs()
        else:
            call[name] = make.randn(*shape)
            call[name][:, :, past + queries :] = 8.0  # what lies beyond the new tokens is nobody's
    return call | options


def _masked(make: Make, queries: int, past: int, lengths: tuple[int, ...], *, added: bool = False, **more: Any) -> Call:
    mask = left_padding(make, queries, past + queries, lengths)
    if added:
        mask = torch.where(mask, make.tensor(0.0), make.tensor(-math.inf))
    return _call(make, queries, past, batch=len(lengths), mask=mask, **more)


def _strided_cache(make: Make) -> Call:
    """A cache kept as [B, capacity, Hkv, D], and rows of hidden that are not next to each other."""
    call = _call(make, 2, 5, batch=2)
    for name in ("k_cache", "v_cache"):
        call[name] = call[name].transpose(1, 2).contiguous().transpose(1, 2)
    return call | {"hidden": call["hidden"].transpose(0, 1).contiguous().transpose(0, 1)}


_ALL = ("q", "k", "v", "o", "gate", "up", "down")
_SMALL = (torch.float32, torch.bfloat16)
_HALVES = (torch.bfloat16, torch.float16)
# Among many codes of activations some lie next to a tie, where fp32's last bit decides on a whole step.
_MANY_CODES = {"w8a8": _HALVES, "w8a16": (torch.float32, *_HALVES)}

CASES = [
    *each_dtype(_OP, "first-token", partial(_call, queries=1)),
    *each_dtype(_OP, "7-tokens", partial(_call, queries=7)),
    *each_dtype(_OP, "no-cache", partial(_call, queries=5, batch=2, cached=False)),
    *each_dtype(_OP, "decode", partial(_call, queries=1, past=21)),
    *each_dtype(
        _OP, "decode-batch-3", partial(_call, queries=1, past=9, batch=3, heads=(6, 2), dim=6, hidden=17, inner=33)
    ),
    *each_dtype(_OP, "odd-sizes", partial(_call, queries=3, past=4, heads=(3, 1), dim=10, hidden=65, inner=63)),
    *each_dtype(_OP, "continued", partial(_call, queries=6, past=5, batch=2)),
    *each_dtype(_OP, "40-tokens", partial(_call, queries=40, past=3, hidden=32, inner=48)),
    *each_dtype(_OP, "smollm2", partial(_call, queries=1, past=33, hidden=576, heads=(9, 3), dim=64, inner=1536)),
    *each_dtype(_OP, "biases", partial(_call, queries=2, past=3, biases=_ALL), dtypes=_SMALL),
    *each_dtype(_OP, "qwen2", partial(_call, queries=1, past=3, biases=("q", "k", "v")), dtypes=_SMALL),
    *each_dtype(_OP, "qwen3", partial(_call, queries=2, past=6, head_norms=True, batch=2), dtypes=_SMALL),
    *each_dtype(_OP, "gemma", partial(_call, queries=2, past=6, norm_offset=1.0, head_norms=True), dtypes=_SMALL),
    *each_dtype(_OP, "int8-cache-first-tokens", partial(_call, queries=5, int8_cache=True), dtypes=_SMALL),
    *each_dtype(_OP, "phi3", partial(_call, queries=2, past=4, packed=True, rotary_dim=6), dtypes=_SMALL),
    *each_dtype(_OP, "interleaved", partial(_call, queries=3, past=2, interleaved=True, rotary_dim=4), dtypes=_SMALL),
    *each_dtype(_OP, "window", partial(_call, queries=3, past=9, window=4), dtypes=_SMALL),
    *each_dtype(_OP, "window-decode", partial(_call, queries=1, past=9, window=4), dtypes=_SMALL),
    *each_dtype(_OP, "softcap", partial(_call, queries=2, past=4, softcap=1.5, sm_scale=0.5), dtypes=_SMALL),
    *each_dtype(_OP, "gelu", partial(_call, queries=2, past=4, activation="gelu"), dtypes=_SMALL),
    *each_dtype(_OP, "gelu-tanh", partial(_call, queries=2, past=4, activation="gelu_tanh"), dtypes=_SMALL),
    *each_dtype(_OP, "left-padding", partial(_masked, queries=4, past=2, lengths=(6, 3)), dtypes=_SMALL),
    *each_dtype(_OP, "left-padding-decode", partial(_masked, queries=1, past=8, lengths=(9, 4)), dtypes=_SMALL),
    *each_dtype(_OP, "added-mask", partial(_masked, queries=3, past=4, lengths=(7, 5), added=True), dtypes=_SMALL),
    *each_dtype(_OP, "strided-cache", _strided_cache, dtypes=_SMALL),
    *[
        case
        for scheme in ("w8a8", "w8a16")
        for case in (
            *each_dtype(_OP, f"int8-{scheme}", partial(_call, queries=1, past=5, int8=True, scheme=scheme)),
            *each_dtype(
                _OP, f"int8-{scheme}-biases", partial(_call, queries=3, past=5, int8=True, scheme=scheme, biases=_ALL)
            ),
            *each_dtype(
                _OP,
                f"int8-{scheme}-70-tokens",
                partial(_call, queries=70, past=5, int8=True, scheme=scheme),
                dtypes=_MANY_CODES[scheme],
            ),
        )
    ],
    *each_dtype(
        _OP,
        "int8-schemes",
        partial(_call, queries=3, past=5, int8=True, scheme="w8a8,w8a16,w8a8,w8a8,w8a8,w8a16,w8a16"),
        dtypes=_SMALL,
    ),
    *each_dtype(
        _OP, "int8-but-down", partial(_call, queries=2, past=5, int8=_ALL[:-1], head_norms=True), dtypes=_SMALL
    ),
    *each_dtype(_OP, "int8-cache", partial(_call, queries=1, past=12, int8_cache=True), dtypes=_SMALL),
    *each_dtype(
        _OP, "int8-cache-continued", partial(_call, queries=5, past=7, batch=2, int8_cache=True), dtypes=_SMALL
    ),
    *each_dtype(
        _OP,
        "int8-cache-left-padding",
        partial(_masked, queries=1, past=8, lengths=(9, 4), int8_cache=True),
        dtypes=_SMALL,
    ),
    *each_dtype(_OP, "0-batch", partial(_call, queries=1, past=2, batch=0), dtypes=(torch.float32,)),
]
