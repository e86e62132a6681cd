from __future__ import annotations

from functools import partial

import torch

from llmkern.testing.case import Call, Make, each_dtype


def _call(make: Make, shape: tuple[int, ...], bias: bool = False, weight: bool = True, offset: float = 0.0) -> Call:
    return {
        "x": make.randn(*shape, scale=2.0),
        "weight": make.randn(shape[-1], offset=1.0 - offset, scale=0.3) if weight else None,
        "bias": make.randn(shape[-1]) if bias else None,
        "eps": 1e-6,
        "weight_offset": offset,
    }


def _strided(make: Make) -> Call:
    call = _call(make, (6, 4, 40))
    return call | {"x": call["x"].transpose(0, 1)}


def _zero_row(make: Make) -> Call:
    call = _call(make, (3, 64))
    call["x"][1] = 0
    return call


def _nan_row(make: Make) -> Call:
    call = _call(make, (3, 64))
    call["x"][1, 7] = float("nan")
    return call


_GRAD = ("x", "weight", "bias")
CASES = [
    *[
        case
        for rows, hidden in ((1, 1), (3, 7), (2, 8), (5, 300), (199, 64), (2, 577), (1, 4096))
        for case in each_dtype(
            "rms_norm", f"{rows}x{hidden}", partial(_call, shape=(rows, hidden)), differentiable=_GRAD
        )
    ],
    *each_dtype("rms_norm", "2x3x64-offset", partial(_call, shape=(2, 3, 64), offset=1.0), differentiable=_GRAD),
    *each_dtype("rms_norm", "4x64-bias", partial(_call, shape=(4, 64), bias=True), differentiable=_GRAD),
    *each_dtype("rms_norm", "4x64-no-weight", partial(_call, shape=(4, 64), weight=False), differentiable=_GRAD),
    *each_dtype("rms_norm", "4x6x40-strided", _strided, differentiable=_GRAD),
    *each_dtype("rms_norm", "zero-row", _zero_row, differentiable=_GRAD),
    *each_dtype("rms_norm", "nan-row", _nan_row, dtypes=(torch.float32,)),
    *each_dtype("rms_norm", "0x64-empty", partial(_call, shape=(0, 64)), dtypes=(torch.float32,)),
]
