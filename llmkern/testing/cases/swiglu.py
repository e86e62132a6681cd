from __future__ import annotations

from functools import partial

import torch

from llmkern.testing.case import Call, Make, each_dtype


def gated(make: Make, shape: tuple[int, ...], scale: float = 3.0) -> Call:
    return {"gate": make.randn(*shape, scale=scale), "up": make.randn(*shape)}


def packed(make: Make) -> Call:
    gate, up = make.randn(3, 5, 2 * 24).chunk(2, dim=-1)
    return {"gate": gate, "up": up}


def transposed(make: Make) -> Call:
    return {"gate": make.randn(7, 4, 3).permute(2, 1, 0), "up": make.randn(3, 4, 7)}


def saturated(make: Make) -> Call:
    """Gates where exp overflows in fp32 (and the gate in fp16), and where silu has its minimum."""
    gate = make.tensor([[-1e4, -200.0, -88.8, -40.0, -1.278, -0.0], [0.0, 1e-6, 17.0, 89.0, 200.0, 1e4]])
    return {"gate": gate, "up": make.randn(*gate.shape)}


def _special(make: Make) -> Call:
    nan, inf = float("nan"), float("inf")
    return {"gate": make.tensor([nan, 1.0, inf, 1.0]), "up": make.tensor([1.0, nan, 1.0, inf])}


_GRAD = ("gate", "up")
CASES = [
    *[
        case
        for shape in ((1, 1), (3, 7), (2, 3, 64), (5, 300), (1, 4096))
        for case in each_dtype("swiglu", "x".join(map(str, shape)), partial(gated, shape=shape), differentiable=_GRAD)
    ],
    *each_dtype("swiglu", "3x5x24-packed", packed, differentiable=_GRAD),
    *each_dtype("swiglu", "3x4x7-transposed", transposed, differentiable=_GRAD),
    *each_dtype("swiglu", "saturated", saturated, differentiable=_GRAD),
    *each_dtype("swiglu", "nan-and-infinity", _special, dtypes=(torch.float32, torch.bfloat16)),
    *each_dtype("swiglu", "0x64-empty", partial(gated, shape=(0, 64)), dtypes=(torch.float32,)),
]
