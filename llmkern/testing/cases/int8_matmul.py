from __future__ import annotations

from functools import partial

import torch

from llmkern.testing.case import Call, Case, Make, each_dtype


def _codes(make: Make, rows: tuple[int, ...], n: int, k: int) -> Call:
    """Bare accumulators."""
    return {
        "a_q": make.randint(-128, 128, *rows, k, dtype=torch.int8),
        "w_q": make.randint(-128, 128, n, k, dtype=torch.int8),
        "a_scale": None,
        "w_scale": None,
        "bias": None,
        "residual": None,
        "activation": "none",
        "out_dtype": torch.int32,
    }


def _scaled(
    make: Make,
    rows: tuple[int, ...],
    n: int,
    k: int,
    *,
    bias: bool = False,
    residual: bool = False,
    activation: str = "none",
) -> Call:
    """Results of size 1; bias and residual in the output's dtype."""
    size = 1 / (74.0 * max(k, 1) ** 0.5)
    return _codes(make, rows, n, k) | {
        "a_scale": make.randn(*rows, 1, dtype=torch.float32, scale=0.1, offset=1.0).abs() * size,
        "w_scale": make.randn(n, 1, dtype=torch.float32, scale=0.1, offset=1.0).abs() / 74.0,
        "bias": make.randn(n) if bias else None,
        "residual": make.randn(*rows, n) if residual else None,
        "activation": activation,
        "out_dtype": make.dtype,
    }


def _strided(make: Make) -> Call:
    call = _scaled(make, (4, 6), 16, 32)
    wide = make.randint(-128, 128, 16, 64, dtype=torch.int8)
    return call | {"a_q": call["a_q"].transpose(0, 1).contiguous().transpose(0, 1), "w_q": wide[:, ::2]}


def _extreme(make: Make, value: int) -> Call:
    """The largest accumulators, of both signs; K = 4099 has a remainder in every tile."""
    call = _codes(make, (3,), 5, 4099)
    call["a_q"].fill_(-128)
    call["w_q"].fill_(value)
    return call


def _nan_scale(make: Make) -> Call:
    call = _scaled(make, (3,), 8, 16, bias=True, activation="silu")
    call["a_scale"][1] = float("nan")
    return call


def _one_accumulator(name: str, rows: tuple[int, ...], n: int, k: int) -> Case:
    return Case("int8_matmul", f"{name}-s32", torch.float32, partial(_codes, rows=rows, n=n, k=k), rule="bits")


SHAPES = [
    ((1,), 1, 1),
    ((3,), 7, 5),
    ((2, 3), 9, 17),
    ((17,), 8, 8),
    ((1,), 64, 577),
    ((16,), 577, 64),
    ((127,), 65, 131),
    ((130,), 128, 256),
]
EMPTY = [((0,), 8, 16), ((3,), 0, 16), ((3,), 8, 0), ((2, 0), 8, 8)]

CASES = [
    *[_one_accumulator(f"{rows}x{n}x{k}", rows, n, k) for rows, n, k in SHAPES + EMPTY],
    Case("int8_matmul", "largest-sums", torch.float32, partial(_extreme, value=-128), rule="bits"),
    Case("int8_matmul", "smallest-sums", torch.float32, partial(_extreme, value=127), rule="bits"),
    *[
        case
        for rows, n, k in SHAPES
        for case in each_dtype("int8_matmul", f"{rows}x{n}x{k}", partial(_scaled, rows=rows, n=n, k=k))
    ],
    *[
        case
        for activation in ("none", "gelu", "gelu_tanh", "silu", "relu")
        for case in each_dtype(
            "int8_matmul",
            f"fused-{activation}",
            partial(_scaled, rows=(5,), n=24, k=40, bias=True, residual=True, activation=activation),
        )
    ],
    *each_dtype("int8_matmul", "bias", partial(_scaled, rows=(19,), n=16, k=32, bias=True)),
    *each_dtype("int8_matmul", "residual", partial(_scaled, rows=(19,), n=16, k=32, residual=True)),
    *each_dtype("int8_matmul", "strided", _strided, dtypes=(torch.float32,)),
    *each_dtype("int8_matmul", "nan-scale", _nan_scale, dtypes=(torch.float32,)),
    *each_dtype(
        "int8_matmul", "3x8x0-bias", partial(_scaled, rows=(3,), n=8, k=0, bias=True), dtypes=(torch.bfloat16,)
    ),
]
