"""The accuracy rule.  A result is right where it is faithful, or where PyTorch's is not and it is no worse than that.

Faithful: every element is within one unit in the last place of the exact result, plus `SPREADS` times the spread that
rounding gives the op's definition (llmkern.testing.monte_carlo); and where there are `MANY` elements, the root mean
square of the errors in that unit is at most half.  `exact` is the reference in float64.  Nothing here depends on the
processor: a result that rounds as its definition does passes anywhere.

No worse than PyTorch: the largest error is at most twice that of PyTorch's own operator in the precision under test,
plus one rounding, eps(dtype) · max|exact| (the rule that flash-attention's tests use).  It decides about whole models,
and about ops that PyTorch composes of several, which round in between.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Error", "as_list", "assert_as_accurate", "assert_same_bits", "cast", "errors", "faithful_unit", "spreads",
    "unfaithful", "upcast",
]  # fmt: skip

FACTOR = 2.0
SPREADS = 8.0
MANY = 64


@dataclass(frozen=True)
class Error:
    """Largest absolute errors against the exact result, and the largest that a comparison with PyTorch allows.

    explained: whether the result is faithful all the same, by draws of Monte Carlo arithmetic.
    """

    candidate: float
    baseline: float
    allowed: float
    explained: bool = False

    @property
    def ok(self) -> bool:
        return self.explained or self.candidate <= self.allowed


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


def _gap(a: Tensor, exact: Tensor) -> Tensor:
    """Return |a − exact| in float64: 0 where both are the same infinity or NaN, infinite where only one is NaN.

    A value that the dtype of `a` cannot hold is exact where `a` has the infinity, or the largest number, in its place.
    """
    largest = torch.finfo(a.dtype).max if a.is_floating_point() else math.inf
    near = exact.double().to(a.dtype) if a.is_floating_point() else exact
    same = (a == near) & (near.isinf() | (exact == a)) | (a.isnan() & exact.isnan())
    same |= (exact.abs() > largest) & (a.abs() == largest) & (a.sign() == exact.sign())
    return torch.where(same, 0.0, (a.double() - exact.double()).abs()).nan_to_num(nan=math.inf, posinf=math.inf)


def _distance(a: Tensor, exact: Tensor) -> float:
    """Return the largest `_gap`."""
    return float(_gap(a, exact).max()) if a.numel() else 0.0


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance between neighbouring numbers of `dtype` at each element of `exact`."""
    info = torch.finfo(dtype)
    size = exact.double().abs().nan_to_num(nan=1.0, posinf=info.max).clamp(info.smallest_normal, info.max)
    return torch.exp2(torch.floor(torch.log2(size))) * info.eps


def spreads(exact: Any, draws: Callable[[], Sequence[Any]]) -> list[Callable[[], Tensor]]:
    """Return for each output a function that says, in float64, how far rounding moves each of its elements.

    exact: the outputs of a definition in float64.  draws: takes nothing, returns the outputs under Monte Carlo
    arithmetic, several times; called when the first of the functions is.
    """
    runs = functools.cache(lambda: [as_list(draw) for draw in draws()])

    def spread(output: int, exact: Tensor) -> Tensor:
        gaps = [(run[output].double() - exact.double()).nan_to_num(0.0, 0.0, 0.0) for run in runs()]
        square = torch.stack(gaps).square().mean(0)
        # Few draws of one element say little: its row (the whole output, if rows are short) is the least.
        row = square.mean(-1, keepdim=True) if square.dim() and square.shape[-1] >= MANY else square.mean()
        return torch.maximum(square, row).sqrt()

    return [functools.partial(spread, i, e) for i, e in enumerate(as_list(exact))]


def faithful_unit(exact: Tensor, dtype: torch.dtype, spread: Tensor) -> Tensor:
    """Return the largest error of a faithful element: one ulp of `dtype`, and `SPREADS` times the spread."""
    return ulp(exact, dtype) + SPREADS * spread


def unfaithful(out: Tensor, exact: Tensor, spread: Callable[[], Tensor]) -> str | None:
    """Say where `out` is further from `exact` than rounding explains, or return None.

    spread: takes nothing, returns what rounding makes of the definition; asked only where one ulp is not enough.
    """
    if not out.numel():
        return None
    gap = _gap(out, exact)
    without = _exceeds(out, exact, gap, ulp(exact, out.dtype))
    return without and _exceeds(out, exact, gap, faithful_unit(exact, out.dtype, spread()))


def _exceeds(out: Tensor, exact: Tensor, gap: Tensor, unit: Tensor) -> str | None:
    """Say where the errors `gap` are beyond `unit`, or beyond half of it in root mean square; None if nowhere."""
    scaled = gap / unit
    worst = int(scaled.argmax())
    if float(scaled.flatten()[worst]) > 1:
        got, want, allowed = (float(t.flatten()[worst]) for t in (out, exact, unit))
        wrong = int((scaled > 1).sum())
        return f"{wrong} of {out.numel()} elements; flat index {worst} is {got:.9g}, exact {want:.9g} ± {allowed:.3g}"
    typical = float(scaled.square().mean().sqrt())
    if out.numel() >= MANY and typical > 0.5:
        return f"errors are {typical:.2f} of what rounding explains in root mean square, half is allowed"
    return None


def errors(out: Any, baseline: Any, exact: Any, *, factor: float = FACTOR) -> list[Error]:
    """Compare with PyTorch's errors: one `Error` per output.  Shapes must agree, integers must be exact."""
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
    out: Any,
    *,
    baseline: Any,
    exact: Any,
    spreads: Sequence[Callable[[], Tensor]] | None = None,
    factor: float = FACTOR,
    names: Sequence[str] | None = None,
) -> None:
    """Raise AssertionError, with the numbers, where an output breaks the rule.

    spreads: of the op's definition, one for each output; None for whole models, which PyTorch alone judges.
    """
    found = errors(out, baseline, exact, factor=factor)
    present = [t for t in zip(as_list(out), as_list(baseline), as_list(exact), strict=True) if t[0] is not None]
    for i, (o, b, e) in enumerate(present):
        name, reason = names[i] if names else f"output {i}", None
        if spreads is not None and o.is_floating_point():
            reason = unfaithful(o, e, spreads[i])
            if not reason:
                continue
            if not unfaithful(b, e, spreads[i]):
                raise AssertionError(f"{name}: {reason}; PyTorch's is faithful")
        if not found[i].ok:
            raise AssertionError(
                f"{name}: error {found[i].candidate:.3g} against the exact result; PyTorch's is "
                f"{found[i].baseline:.3g}, so {found[i].allowed:.3g} is allowed" + (f" ({reason})" if reason else "")
            )


def assert_same_bits(out: Any, expected: Any) -> None:
    """Raise AssertionError where an output differs at all; NaN equals NaN, whatever its payload."""
    for o, e in zip(as_list(out), as_list(expected), strict=True):
        torch.testing.assert_close(o, e, rtol=0, atol=0, equal_nan=True)
