from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from llmkern.packed import CODES, PackedWeight
from llmkern.testing.case import Call, Make, each_dtype

KINDS = ("q8_0", "s4-g128", "s4-g32", "u4-zero-g64", "u4-offset", "q4_k", "q5_k", "q6_k", "nl4", "iq4_xs")
"""GGUF's blocks, and int4 with scales in each floating dtype and zero points."""


def random_packed(make: Make, kind: str, n: int, k: int) -> PackedWeight:
    """A weight of this kind whose products with normal x have size 1."""

    def codes(code: str) -> Tensor:
        bits = CODES[code].bits
        if bits == 8:
            return make.randint(-128, 128, n, k, dtype=torch.int8)
        return make.randint(0, 1 << bits, n, k, dtype=torch.uint8)

    def scales(group: int, size: float, dtype: torch.dtype) -> Tensor:
        values = make.randn(n, k // group, dtype=torch.float32, scale=0.1, offset=1.0).abs()
        return (values * (size / max(k, 1) ** 0.5)).to(dtype)

    def small(group: int, most: int, dtype: torch.dtype) -> Tensor:
        return make.randint(-most if dtype == torch.int8 else 0, most, n, k // group, dtype=dtype)

    half, rows = torch.float16, PackedWeight.from_rows
    if kind == "q8_0":
        return rows("s8", codes("s8"), scales(32, 1 / 73, half))
    if kind == "s8-g64":
        return rows("s8", codes("s8"), scales(64, 1 / 73, torch.float32))
    if kind == "s4-g128":
        return rows("s4", codes("s4"), scales(128, 1 / 4.6, torch.bfloat16))
    if kind == "s4-g32":
        return rows("s4", codes("s4"), scales(32, 1 / 4.6, torch.float32))
    if kind == "u4-zero-g64":
        return rows("u4", codes("u4"), scales(64, 1 / 5.5, torch.float32), zero=small(64, 17, torch.uint8))
    if kind == "u4-offset":
        return rows("u4", codes("u4"), scales(32, 1 / 4.6, half), offset=scales(32, -7.5 / 4.6, half))
    if kind in ("q4_k", "q5_k"):
        code, levels = ("u4", 7.5) if kind == "q4_k" else ("u5", 15.5)
        return rows(
            code,
            codes(code),
            small(32, 64, torch.uint8),
            offset=small(32, 64, torch.uint8),
            super_scale=scales(256, 1 / 32 / levels, half),
            super_offset=scales(256, -1 / 32, half),
        )
    if kind == "q6_k":
        return rows("s6", codes("s6"), small(16, 128, torch.int8), super_scale=scales(256, 1 / 73 / 18, half))
    if kind == "nl4":
        return rows("nl4", codes("nl4"), scales(32, 1 / 69, half))
    return rows("nl4", codes("nl4"), small(32, 32, torch.int8), super_scale=scales(256, 1 / 69 / 18, half))


def _call(
    make: Make,
    kind: str,
    rows: tuple[int, ...],
    n: int,
    k: int,
    *,
    scheme: str = "a8",
    activation: str = "none",
    bias: bool = True,
    residual: bool = False,
) -> Call:
    packed = random_packed(make, kind, n, k)
    names = ("codes", "scale", "zero", "offset", "super_scale", "super_offset")
    return {
        "x": make.randn(*rows, k),
        **{name: packed.tensors.get(name) for name in names},
        "bias": make.randn(n) if bias else None,
        "residual": make.randn(*rows, n) if residual else None,
        "code": packed.code,
        "n": n,
        "activation": activation,
        "scheme": scheme,
    }


def _strided(make: Make) -> Call:
    call = _call(make, "q4_k", (6, 4), 24, 256, residual=True)
    return call | {name: call[name].transpose(0, 1) for name in ("x", "residual")}


def _special_rows(make: Make) -> Call:
    """Rows with nothing but zeros, a NaN, an infinity, one overwhelming value, a block that rounds to nothing; each may
    only spoil itself."""
    call = _call(make, "u4-zero-g64", (5,), 8, 128)
    call["x"][0] = 0
    call["x"][1, 7] = float("nan")
    call["x"][2, 70] = float("inf")
    call["x"][3, 7] = 3e4
    call["x"][4, 32:64] = 1e-37
    return call


def _saturating(make: Make, kind: str, high: bool) -> Call:
    """Every x and every code at the end of its range: the largest sums of a block that there are."""
    call = _call(make, kind, (9,), 16, 256, bias=False)
    call["x"].fill_(1.0)
    call["codes"].fill_(0x7F if high and kind == "q8_0" else 0xFF if high else 0x80 if kind == "q8_0" else 0)
    return call


_GRAD = ("x", "bias", "residual")
CASES = [
    *[
        case
        for kind in KINDS
        for rows, n, k in (((3,), 17, 256), ((1,), 40, 512), ((9,), 33, 256), ((2, 35), 65, 768))
        for case in each_dtype(
            "quantized_linear",
            f"{kind}-{rows}x{n}x{k}",
            partial(_call, kind=kind, rows=rows, n=n, k=k),
            dtypes=(torch.float32, torch.bfloat16) if len(rows) == 1 and n < 40 else (torch.float32,),
            differentiable=_GRAD if rows == (3,) else (),
        )
    ],
    *[
        case
        for kind in ("q8_0", "q4_k", "u4-zero-g64")
        for case in each_dtype(
            "quantized_linear",
            f"{kind}-a16",
            partial(_call, kind=kind, rows=(5,), n=24, k=256, scheme="a16"),
            differentiable=_GRAD,
        )
    ],
    *[
        case
        for kind, rows, n, k, more in (
            ("s4-g128", (2, 3), 17, 512, {"residual": True, "activation": "silu"}),
            ("s4-g32", (1,), 577, 96, {"bias": False}),
            ("u4-offset", (9,), 33, 288, {}),
        )
        for case in each_dtype(
            "quantized_linear",
            f"{kind}-a16-{rows}x{n}x{k}",
            partial(_call, kind=kind, rows=rows, n=n, k=k, scheme="a16", **more),
            dtypes=(torch.float32, torch.bfloat16),
        )
    ],
    *[
        case
        for rows, n, k in (((0,), 8, 64), ((3,), 0, 64), ((3,), 8, 0))
        for case in each_dtype(
            "quantized_linear",
            f"a16-{rows}x{n}x{k}",
            partial(_call, kind="s4-g32", rows=rows, n=n, k=k, scheme="a16"),
            dtypes=(torch.float32,),
        )
    ],
    *[
        case
        for activation in ("gelu", "gelu_tanh", "silu", "relu")
        for case in each_dtype(
            "quantized_linear",
            f"{activation}-residual",
            partial(_call, kind="s4-g32", rows=(5,), n=40, k=64, activation=activation, residual=True),
            differentiable=_GRAD,
        )
    ],
    *[
        case
        for rows, n, k in (((1,), 1, 32), ((7,), 48, 32), ((4,), 31, 96), ((16,), 577, 64), ((8,), 5, 1600))
        for case in each_dtype(
            "quantized_linear", f"q8_0-{rows}x{n}x{k}", partial(_call, kind="q8_0", rows=rows, n=n, k=k, bias=False)
        )
    ],
    *[
        case
        for rows in ((3,), (9,))
        for case in each_dtype(
            "quantized_linear",
            f"s8-g64-{rows}x33x256",
            partial(_call, kind="s8-g64", rows=rows, n=33, k=256),
            dtypes=(torch.float32,),
        )
    ],
    *each_dtype("quantized_linear", "strided", _strided, differentiable=_GRAD),
    *each_dtype("quantized_linear", "special-rows", _special_rows),
    *[
        case
        for kind in ("q8_0", "s4-g32", "q5_k", "q6_k", "nl4")
        for high in (False, True)
        for case in each_dtype(
            "quantized_linear",
            f"{kind}-saturating-{'high' if high else 'low'}",
            partial(_saturating, kind=kind, high=high),
            dtypes=(torch.float32,),
        )
    ],
    *[
        case
        for rows, n, k in (((0,), 8, 64), ((3,), 0, 64), ((3,), 8, 0))
        for case in each_dtype(
            "quantized_linear",
            f"{rows}x{n}x{k}",
            partial(_call, kind="q8_0", rows=rows, n=n, k=k),
            dtypes=(torch.float32,),
        )
    ],
]
