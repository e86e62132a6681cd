from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llmkern.testing.case import Call, Case, Make, each_dtype


def _call(make: Make, approximate: str, inputs: Callable[[Make], Tensor]) -> Call:
    return {"x": inputs(make), "approximate": approximate}


def _random(make: Make, shape: tuple[int, ...]) -> Tensor:
    return make.randn(*shape, scale=2.0)


def _strided(make: Make) -> Tensor:
    return make.randn(7, 4, 6).permute(2, 1, 0)[..., ::2]


def _tails(make: Make) -> Tensor:
    return make.tensor([-1e4, -50.0, -13.0, -5.5, -3.0, -0.7518, -1e-6, -0.0, 0.0, 1e-6, 3.0, 5.5, 13.0, 50.0, 1e4])


def _special(make: Make) -> Tensor:
    return make.tensor([float("nan"), float("inf"), 1.0])


def _cases(approximate: str) -> list[Case]:
    def add(name: str, inputs: Callable[[Make], Tensor]) -> list[Case]:
        build = partial(_call, approximate=approximate, inputs=inputs)
        return each_dtype("gelu", f"{name}-{approximate}", build, differentiable=("x",))

    return [
        *[
            case
            for shape in ((1, 1), (3, 7), (2, 3, 64), (5, 300), (1, 4096))
            for case in add("x".join(map(str, shape)), partial(_random, shape=shape))
        ],
        *add("6x4x4-strided", _strided),
        *add("tails", _tails),
    ]


CASES = [
    *_cases("none"),
    *_cases("tanh"),
    *[
        case
        for approximate in ("none", "tanh")
        for case in each_dtype(
            "gelu", f"nan-and-infinity-{approximate}", partial(_call, approximate=approximate, inputs=_special)
        )
    ],
    *each_dtype(
        "gelu",
        "0x64-empty",
        partial(_call, approximate="none", inputs=partial(_random, shape=(0, 64))),
        dtypes=(torch.float32,),
    ),
]
