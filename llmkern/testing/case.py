"""Cases: the inputs on which every implementation of an op is tested, checked and timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmkern import dispatch

__all__ = ["Call", "Case", "Make", "Rule", "each_dtype", "cases", "ops_with_cases"]


Call = dict[str, Any]
"""The arguments of an op's schema, by name."""

Rule = Literal["accuracy", "bits", "codes"]
"""How `llmkern.testing.judge` judges a result; described there."""


class Make:
    """Random inputs of one dtype on one device, reproducible on every device (drawn on the CPU in fp32)."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device, seed: int) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int, scale: float = 1.0, offset: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values with standard deviation `scale` and mean `offset`."""
        values = torch.randn(shape, generator=self._generator) * scale + offset
        return values.to(dtype or self.dtype).to(self.device)

    def randint(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self._generator).to(dtype).to(self.device)

    def tensor(self, values: Any, dtype: torch.dtype | None = None) -> Tensor:
        """The given values."""
        return torch.tensor(values, dtype=dtype or self.dtype, device=self.device)


@dataclass(frozen=True)
class Case:
    """One call of one op.

    name: shape and speciality, as shown in test ids.  dtype: of the op's floating inputs.
    build: takes a `Make`, returns the call: exactly the arguments of the op's schema, by name.
    differentiable: names of the arguments whose gradients are tested (the op's whole list; None arguments are skipped).
    rule: how a result is judged.
    value: for the rule "codes": takes the call, returns the op, and its call, whose fp32 result the codes stand for.
    """

    op: str
    name: str
    dtype: torch.dtype
    build: Callable[[Make], Call]
    differentiable: tuple[str, ...] = ()
    rule: Rule = "accuracy"
    value: Callable[[Call], tuple[str, Call]] | None = None

    def make(self, device: str | torch.device = "cpu", *, seed: int = 0, dtype: torch.dtype | None = None) -> Call:
        """The call's arguments; `dtype` replaces the case's own (float64 for gradient checks)."""
        return self.build(Make(dtype or self.dtype, device, seed))

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


def each_dtype(
    op: str,
    name: str,
    build: Callable[[Make], Call],
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
    differentiable: tuple[str, ...] = (),
    rule: Rule = "accuracy",
    value: Callable[[Call], tuple[str, Call]] | None = None,
) -> list[Case]:
    """The same inputs in several dtypes."""
    return [Case(op, name, dtype, build, differentiable, rule, value) for dtype in dtypes]


def cases(op: str) -> list[Case]:
    """The cases of `op`: `CASES` in llmkern/testing/cases/<op>.py."""
    return list(importlib.import_module(f"llmkern.testing.cases.{op}").CASES)


def ops_with_cases() -> list[str]:
    """Every op that is not a backward; each must have cases."""
    return [op for op in dispatch.ops() if not op.endswith("_backward")]
