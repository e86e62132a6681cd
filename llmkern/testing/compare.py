"""The accuracy rule: no less accurate than PyTorch.

|out − exact| ≤ 2 · |baseline − exact| + one rounding, where `exact` is the reference in float64 and `baseline` is
PyTorch's own operator in the precision under test (the rule that flash-attention's tests use).  The rounding
term, eps(dtype) · max|exact|, covers a baseline that happens to hit the exact value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Error", "as_list", "assert_as_accurate", "assert_same_bits", "cast", "errors", "upcast"]

FACTOR = 2.0


@dataclass(frozen=True)
class Error:
    """Largest absolute errors against the exact result, and the largest that the rule allows."""

    candidate: float
    baseline: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.candidate <= self.allowed


def cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every floating tensor, and every floating dtype asked for, in `dtype`; the rest as it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, torch.dtype):
        return dtype if value.is_floating_point else value
    if isinstance(value, dict):
        return {k: cast(v, dtype) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(cast(v, dtype) for v in value)
    return value


def upcast(value: Any) -> Any:
    """`value` with every floating tensor in float64; containers and other values as they are."""
    return cast(value, torch.float64)


def as_list(value: Any) -> list[Tensor]:
    """The outputs of an op, whether it has one or several."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _distance(a: Tensor, exact: Tensor) -> float:
    """Largest |a − exact|; equal infinities are at distance 0; a NaN on one side only is at distance inf."""
    a, exact = a.double(), exact.double()
    if a.numel() == 0:
        return 0.0
    gap = (a - exact).abs()
    gap = torch.where((a == exact) | (a.isnan() & exact.isnan()), torch.zeros_like(gap), gap)
    return float(gap.nan_to_num(nan=float("inf")).max())


def errors(out: Any, baseline: Any, exact: Any, *, factor: float = FACTOR) -> list[Error]:
    """One `Error` per output tensor.  Shapes must agree; integer outputs are allowed no error at all."""
    found = []
    for o, b, e in zip(as_list(out), as_list(baseline), as_list(exact), strict=True):
        if o is None or e is None:
            if (o is None) != (e is None):
                raise AssertionError("one of the results has an output that the other lacks")
            continue
        if o.shape != e.shape:
            raise AssertionError(f"shape {list(o.shape)}, expected {list(e.shape)}")
        candidate, base = _distance(o, e), _distance(b, e)
        if not o.is_floating_point():
            found.append(Error(candidate, base, 0.0))
            continue
        finite = e[e.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        found.append(Error(candidate, base, factor * base + torch.finfo(o.dtype).eps * scale))
    return found


def assert_as_accurate(
    out: Any, *, baseline: Any, exact: Any, factor: float = FACTOR, names: Sequence[str] | None = None
) -> None:
    """Raise AssertionError, with the numbers, where an output breaks the rule."""
    for i, error in enumerate(errors(out, baseline, exact, factor=factor)):
        if not error.ok:
            name = names[i] if names else f"output {i}"
            raise AssertionError(
                f"{name}: error {error.candidate:.3g} against the exact result; PyTorch's is {error.baseline:.3g}, "
                f"so {error.allowed:.3g} is allowed"
            )


def assert_same_bits(out: Any, expected: Any) -> None:
    """Raise AssertionError where an output differs at all; NaN equals NaN, whatever its payload."""
    for o, e in zip(as_list(out), as_list(expected), strict=True):
        torch.testing.assert_close(o, e, rtol=0, atol=0, equal_nan=True)
