from __future__ import annotations

from functools import partial

import torch

from llmkern.testing.case import Call, Make, each_dtype


def _call(
    make: Make,
    rows: tuple[int, ...],
    n: int,
    k: int,
    *,
    scheme: str,
    bias: bool = True,
    activation: str = "none",
    scale: float = 2.0,
) -> Call:
    """Results of size 1 at the default scale."""
    return {
        "x": make.randn(*rows, k, scale=scale),
        "w_q": make.randint(-127, 128, n, k, dtype=torch.int8),
        "w_scale": make.randn(n, 1, dtype=torch.float32, scale=0.1, offset=1.0).abs() / (150.0 * max(k, 1) ** 0.5),
        "bias": make.randn(n) if bias else None,
        "activation": activation,
        "scheme": scheme,
    }


def _strided(make: Make, scheme: str) -> Call:
    call = _call(make, (6, 4), 16, 40, scheme=scheme)
    return call | {"x": call["x"].transpose(0, 1)}


def _special_rows(make: Make, scheme: str) -> Call:
    """A zero row, and rows with a NaN, an infinity and one overwhelming value; each may only spoil itself."""
    call = _call(make, (5,), 8, 64, scheme=scheme)
    call["x"][0] = 0
    call["x"][1, 7] = float("nan")
    call["x"][2, 7] = float("inf")
    call["x"][3, 7] = 3e4
    return call


def _saturating(make: Make, scheme: str) -> Call:
    """Every activation and weight at the end of its range, all signs equal: the largest sum there is."""
    call = _call(make, (3,), 16, 96, scheme=scheme, bias=False)
    call["x"].fill_(1.0)
    call["w_q"].fill_(-127)
    return call


_GRAD = ("x", "bias")
CASES = [
    case
    for scheme in ("w8a8", "w8a16")
    for case in [
        *[
            case
            for rows, n, k in (
                ((1,), 1, 1),
                ((3,), 7, 5),
                ((2, 3), 9, 17),
                ((2,), 32, 64),
                ((33,), 65, 130),
                ((1,), 577, 63),
                ((16,), 17, 577),
            )
            for case in each_dtype(
                "int8_linear",
                f"{rows}x{n}x{k}-{scheme}",
                partial(_call, rows=rows, n=n, k=k, scheme=scheme),
                differentiable=_GRAD,
            )
        ],
        *[
            case
            for activation in ("gelu", "gelu_tanh", "silu", "relu")
            for case in each_dtype(
                "int8_linear",
                f"{activation}-{scheme}",
                partial(_call, rows=(5,), n=24, k=40, scheme=scheme, activation=activation),
                differentiable=_GRAD,
            )
        ],
        *each_dtype(
            "int8_linear",
            f"no-bias-{scheme}",
            partial(_call, rows=(5,), n=24, k=40, scheme=scheme, bias=False),
            differentiable=("x",),
        ),
        *each_dtype("int8_linear", f"strided-{scheme}", partial(_strided, scheme=scheme), differentiable=_GRAD),
        *each_dtype("int8_linear", f"special-rows-{scheme}", partial(_special_rows, scheme=scheme)),
        *each_dtype("int8_linear", f"saturating-{scheme}", partial(_saturating, scheme=scheme)),
        *[
            case
            for rows, n, k in (((0,), 8, 16), ((3,), 0, 16), ((3,), 8, 0))
            for case in each_dtype(
                "int8_linear",
                f"{rows}x{n}x{k}-{scheme}",
                partial(_call, rows=rows, n=n, k=k, scheme=scheme),
                dtypes=(torch.float32,),
            )
        ],
    ]
]
