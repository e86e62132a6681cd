from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmkern.testing.case import Call, Make, each_dtype
from llmkern.testing.cases._layer import linear

_OP = "encoder_layer"


def _call(
    make: Make,
    batch: int,
    length: int,
    *,
    hidden: int = 24,
    heads: int = 4,
    dim: int = 6,
    inner: int = 40,
    int8: bool = False,
    bias: bool = True,
    packed: bool = False,
    scheme: str = "w8a8",
    **options: object,
) -> Call:
    across = heads * dim
    sizes = dict.fromkeys("qkv", (across, hidden)) | {"o": (hidden, across), "up": (inner, hidden)}
    linears: Call = {}
    for name, size in (sizes | {"down": (hidden, inner)}).items():
        linears |= linear(make, name, *size, int8=int8, bias=bias)
    if packed:
        weight = torch.cat([linears[f"{n}_weight"] for n in "qkv"])
        linears |= {f"{n}_weight": part for n, part in zip("qkv", weight.split(across), strict=True)}

    def norm() -> Tensor:
        return make.randn(hidden, scale=0.3, offset=1.0)

    return {
        "hidden": make.randn(batch, length, hidden),
        "mask": None,
        "attention_norm": norm(),
        "attention_norm_bias": make.randn(hidden, scale=0.3) if bias else None,
        "output_norm": norm(),
        "output_norm_bias": make.randn(hidden, scale=0.3) if bias else None,
        **linears,
        "heads": heads,
        "eps": 1e-6,
        "sm_scale": dim**-0.5,
        "activation": "gelu",
        "scheme": scheme,
        **options,
    }


def _padded(make: Make, lengths: tuple[int, ...], *, added: bool = False, **options: Any) -> Call:
    """Right-padded sequences; a mask as transformers makes it, bool or additive with the most negative number."""
    keys = max(lengths)
    mask = (make.tensor(range(keys), torch.int64) < make.tensor(lengths, torch.int64)[:, None])[:, None, None]
    if added:
        mask = torch.where(mask, make.tensor(0.0), make.tensor(torch.finfo(make.dtype).min))
    return _call(make, len(lengths), keys, mask=mask, **options)


def _strided(make: Make) -> Call:
    call = _call(make, 3, 5)
    return call | {"hidden": call["hidden"].transpose(0, 1).contiguous().transpose(0, 1)}


def _nothing_to_see(make: Make) -> Call:
    """A sequence whose every token is hidden: its attention is 0."""
    call = _padded(make, (6, 2))
    call["mask"][1] = False
    return call


_SMALL = (torch.float32, torch.bfloat16)
_HALVES = (torch.bfloat16, torch.float16)
# Among many codes of activations some lie next to a tie, where fp32's last bit decides on a whole step.
_MANY_CODES = {"w8a8": _HALVES, "w8a16": (torch.float32, *_HALVES)}

CASES = [
    *each_dtype(_OP, "1-token", partial(_call, batch=1, length=1)),
    *each_dtype(_OP, "2x7", partial(_call, batch=2, length=7)),
    *each_dtype(_OP, "odd-sizes", partial(_call, batch=2, length=5, hidden=17, heads=3, dim=7, inner=33)),
    *each_dtype(_OP, "minilm", partial(_call, batch=2, length=19, hidden=384, heads=12, dim=32, inner=1536)),
    *each_dtype(_OP, "2x40", partial(_call, batch=2, length=40)),
    *each_dtype(_OP, "padded", partial(_padded, lengths=(6, 4, 1))),
    *each_dtype(_OP, "padded-added", partial(_padded, lengths=(6, 4), added=True), dtypes=_SMALL),
    *each_dtype(_OP, "nothing-to-see", _nothing_to_see, dtypes=_SMALL),
    *each_dtype(_OP, "no-biases", partial(_call, batch=2, length=7, bias=False), dtypes=_SMALL),
    *each_dtype(_OP, "packed", partial(_call, batch=2, length=7, packed=True), dtypes=_SMALL),
    *each_dtype(_OP, "strided", _strided, dtypes=_SMALL),
    *[
        case
        for activation in ("gelu_tanh", "silu", "relu")
        for case in each_dtype(_OP, activation, partial(_call, batch=2, length=5, activation=activation), dtypes=_SMALL)
    ],
    *[
        case
        for scheme in ("w8a8", "w8a16")
        for case in (
            *each_dtype(_OP, f"int8-{scheme}", partial(_call, batch=1, length=3, int8=True, scheme=scheme)),
            *each_dtype(
                _OP,
                f"int8-{scheme}-2x40",
                partial(_call, batch=2, length=40, int8=True, scheme=scheme),
                dtypes=_MANY_CODES[scheme],
            ),
            *each_dtype(_OP, f"int8-{scheme}-padded", partial(_padded, lengths=(6, 4), int8=True, scheme=scheme)),
        )
    ],
    *each_dtype(
        _OP,
        "int8-schemes",
        partial(_call, batch=1, length=3, int8=True, scheme="w8a8,w8a8,w8a16,w8a8,w8a16,w8a8"),
        dtypes=_SMALL,
    ),
    *each_dtype(_OP, "0-batch", partial(_call, batch=0, length=3), dtypes=(torch.float32,)),
]
