from __future__ import annotations

from functools import partial

import torch

from llmkern.testing.case import Call, Make, each_dtype
from llmkern.testing.cases.swiglu import gated, packed, saturated, transposed


def _with_nan(make: Make) -> Call:
    """A row all of whose products are NaN, from either side, between two that have none."""
    nan = float("nan")
    return {
        "gate": make.tensor([[1.0, -2.0], [nan, 3.0], [0.5, 4.0]]),
        "up": make.tensor([[2.0, 1.0], [1.0, nan], [-1.0, 2.0]]),
    }


def _with_zeros(make: Make) -> Call:
    call = gated(make, (3, 64))
    call["gate"][1] = 0
    return call


def _swiglu(call: Call) -> tuple[str, Call]:
    return "swiglu", call


_each = partial(each_dtype, "swiglu_quant", rule="codes", value=_swiglu)
_SHAPES = ((1, 1), (3, 7), (2, 3, 64), (67, 65), (2, 577), (1, 9000))
CASES = [
    *[case for shape in _SHAPES for case in _each("x".join(map(str, shape)), partial(gated, shape=shape))],
    *_each("3x5x24-packed", packed),
    *_each("3x4x7-transposed", transposed),
    *_each("saturated", saturated),
    *_each("zero-row", _with_zeros),
    *_each("nan-row", _with_nan, dtypes=(torch.float32, torch.bfloat16)),
    *_each("0x64-empty", partial(gated, shape=(0, 64)), dtypes=(torch.float32,)),
    *_each("3x0-empty", partial(gated, shape=(3, 0)), dtypes=(torch.float32,)),
]
