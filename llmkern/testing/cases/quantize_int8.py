from __future__ import annotations

from functools import partial

import torch

from llmkern.testing.case import Call, Make, each_dtype

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _call(make: Make, shape: tuple[int, ...], scale: float = 2.0) -> Call:
    return {"x": make.randn(*shape, scale=scale)}


def _strided(make: Make) -> Call:
    return {"x": make.randn(6, 40, 4).permute(2, 0, 1)}


def _ties(make: Make) -> Call:
    """amax 127 makes inv exactly 1, so that every half is a tie."""
    row = [i + 0.5 for i in range(-60, 61)]
    return {"x": make.tensor([[127.0, *row], [-127.0, *row]])}


def _tiny(make: Make) -> Call:
    """Around the zero-row threshold; in fp16 these are all zero."""
    edge = 2.0**-118
    return {"x": make.tensor([[edge, -edge / 2, 2.0**-127], [edge * 0.99, 0.0, 0.0], [2.0**-140, 0.0, -(2.0**-149)]])}


def _special(make: Make) -> Call:
    nan, inf = float("nan"), float("inf")
    return {
        "x": make.tensor(
            [[1.0, nan, 2.0], [inf, 1.0, 0.0], [-inf, inf, nan], [0.0, -0.0, 0.0], [1.0, 2.0, -3.0], [65504.0, 0, 1]]
        )
    }


def _huge(make: Make) -> Call:
    """Magnitudes beyond fp32: the scale of the last two rows does not fit."""
    return {"x": make.tensor([[1e38, -3e38], [1e40, 1.0], [1e42, -1e300], [1e300, 0.0]])}


CASES = [
    *[
        case
        for rows, hidden in ((1, 1), (3, 7), (5, 300), (999, 65), (1, 4096))
        for case in each_dtype(
            "quantize_int8",
            f"{rows}x{hidden}",
            partial(_call, shape=(rows, hidden)),
            dtypes=FLOATING,
            rule="bits",
        )
    ],
    *each_dtype("quantize_int8", "4x6x40-strided", _strided, rule="bits"),
    *each_dtype("quantize_int8", "small-values", partial(_call, shape=(7, 33), scale=1e-6), rule="bits"),
    *each_dtype("quantize_int8", "ties", _ties, rule="bits"),
    *each_dtype("quantize_int8", "zero-row-threshold", _tiny, dtypes=FLOATING, rule="bits"),
    *each_dtype("quantize_int8", "special-values", _special, dtypes=FLOATING, rule="bits"),
    *each_dtype("quantize_int8", "beyond-fp32", _huge, dtypes=(torch.float64,), rule="bits"),
    *each_dtype("quantize_int8", "0x64-empty", partial(_call, shape=(0, 64)), dtypes=(torch.float32,), rule="bits"),
    *each_dtype("quantize_int8", "3x0-empty", partial(_call, shape=(3, 0)), dtypes=(torch.float32,), rule="bits"),
]
