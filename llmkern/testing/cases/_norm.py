"""The cases that the normalisations share: each op has some of the arguments below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from llmkern.testing.case import Call, Case, Make, Rule, each_dtype

SIZES = ((1, 1), (3, 7), (2, 8), (5, 300), (199, 64), (2, 577), (1, 4096))
FUSED_SIZES = ((1, 1), (3, 7), (67, 64), (2, 577), (1, 4096))


def _call(
    make: Make,
    optional: Sequence[str],
    shape: tuple[int, ...],
    *,
    weight: bool = True,
    bias: bool = False,
    offset: float = 0.0,
    mean: float = 0.0,
    parameters: torch.dtype | None = None,
) -> Call:
    """Every argument that a normalisation can have, cut down to those that this one has."""
    call = {
        "x": make.randn(*shape, scale=2.0, offset=mean),
        "residual": make.randn(*shape, scale=3.0),
        "weight": make.randn(shape[-1], offset=1.0 - offset, scale=0.3, dtype=parameters) if weight else None,
        "bias": make.randn(shape[-1], dtype=parameters) if bias else None,
        "eps": 1e-6,
        "weight_offset": offset,
    }
    return {name: call[name] for name in ("x", "weight", "bias", "eps", *optional)}


def _strided(make: Make, optional: Sequence[str]) -> Call:
    call = _call(make, optional, (6, 4, 40))
    return call | {name: call[name].transpose(0, 1) for name in ("x", "residual") if name in call}


def _strided_empty(make: Make, optional: Sequence[str]) -> Call:
    """No rows, of elements that would not lie side by side: PyTorch calls that contiguous, whatever the strides."""
    call = _call(make, optional, (0, 64))
    apart = {name: call[name].new_empty(0, 128)[:, ::2] for name in ("x", "residual") if name in call}
    return call | apart


def _with_row(make: Make, optional: Sequence[str], value: float) -> Call:
    call = _call(make, optional, (3, 64))
    call["x"][1] = value
    if "residual" in call:
        call["residual"][1] = 0
    return call


def _value(call: Call, op: str) -> tuple[str, Call]:
    """Return the values that the codes encode: `op` of x, or of the rounded sum."""
    norm = {name: value for name, value in call.items() if name != "residual"}
    return op, norm | {"x": call["x"] + call["residual"]} if "residual" in call else norm


def norm_cases(
    op: str,
    *,
    optional: Sequence[str] = (),
    sizes: Sequence[tuple[int, int]] = SIZES,
    differentiable: tuple[str, ...] = (),
    codes_of: str | None = None,
) -> list[Case]:
    """The cases of a normalisation.

    optional: which of residual and weight_offset the op has beside x, weight, bias and eps.
    codes_of: for an op that quantizes, the norm whose codes it gives.
    """
    rule: Rule = "accuracy" if codes_of is None else "codes"
    value = None if codes_of is None else partial(_value, op=codes_of)

    def add(
        name: str,
        build: Callable[[Make], Call],
        dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
        differentiable: tuple[str, ...] = differentiable,
    ) -> None:
        found.extend(each_dtype(op, name, build, dtypes=dtypes, differentiable=differentiable, rule=rule, value=value))

    found: list[Case] = []
    make = partial(_call, optional=optional)
    for rows, hidden in sizes:
        add(f"{rows}x{hidden}", partial(make, shape=(rows, hidden)))
    if "weight_offset" in optional:
        add("2x3x64-offset", partial(make, shape=(2, 3, 64), offset=1.0))
    add("4x64-bias", partial(make, shape=(4, 64), bias=True))
    add("4x64-no-weight", partial(make, shape=(4, 64), weight=False))
    add("4x64-large-mean", partial(make, shape=(4, 64), mean=200.0))
    add("4x6x40-strided", partial(_strided, optional=optional))
    add("zero-row", partial(_with_row, optional=optional, value=0.0))
    half = (torch.bfloat16, torch.float16)
    add("4x64-fp32-parameters", partial(make, shape=(4, 64), bias=True, parameters=torch.float32), half)
    add("nan-row", partial(_with_row, optional=optional, value=float("nan")), (torch.float32,), ())
    add("0x64-empty", partial(make, shape=(0, 64)), (torch.float32,), ())
    add("0x64-strided-empty", partial(_strided_empty, optional=optional), (torch.float32,), ())
    add("3x0-empty", partial(make, shape=(3, 0)), (torch.float32,), ())
    return found
