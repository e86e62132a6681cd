"""Judge results of cases: the one entry for tests of every backend, on every device.

Three rules, chosen by `Case.rule`:
- "accuracy": every output keeps the accuracy rule (llmkern.testing.compare).
- "bits": every output has the bits of the reference run in the case's own dtype.
- "codes": the first two outputs are int8 codes q and their scale, which stand for the fp32 result of another op,
  `Case.value`.  Codes next to a tie may go either way, so q·scale is to be within half a step of the exact value,
  plus the largest error of a faithful result of that op in fp32; scale·127 is to be within that error of the row's
  largest exact magnitude.  Further outputs keep the accuracy rule.
Arguments that an op writes (its schema marks them) are judged as further outputs, int8 codes to one step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern import dispatch
from llmkern.testing.case import Call, Case
from llmkern.testing.compare import (
    as_list,
    assert_as_accurate,
    assert_same_bits,
    cast,
    faithful_unit,
    spreads,
    upcast,
)
from llmkern.testing.monte_carlo import draws_of

__all__ = [
    "Judge",
    "assert_accurate",
    "assert_right",
    "baseline",
    "cloned",
    "reference",
    "spreads_of",
    "written",
    "written_tensors",
]

# Relative error of q·scale: the scale, its inverse and their product are each rounded, half an ulp.
CODE_ROUNDING = 1.5 * torch.finfo(torch.float32).eps
SCALE_ROUNDING = 0.5 * torch.finfo(torch.float32).eps


def written(op: str) -> list[str]:
    """The arguments that the op writes."""
    arguments = getattr(torch.ops.llmkern, op).default._schema.arguments
    return [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]


def written_tensors(op: str, call: Call) -> list[Tensor]:
    """Return the tensors of the call that the op writes."""
    return list(dispatch.tensors_in([call[name] for name in written(op)]))


def reference(op: str, call: Call) -> Any:
    """Return the reference backend's result for `call`, in the call's own dtype; `call` is not written."""
    return _run(dispatch.implementation(op, "reference"), call)


def baseline(op: str, call: Call) -> Any:
    """PyTorch's operator where it can express the call, else the reference in the call's own dtype."""
    for name in ("torch", "reference"):
        for impl in dispatch.implementations(op):
            if impl.backend.name == name and impl.why_not(**call) is None:
                return _run(impl, call)
    raise AssertionError(f"no baseline for {op}")


def _run(impl: dispatch.Implementation, call: Call) -> Any:
    """The implementation's outputs, followed by copies of the arguments that the op writes, as it leaves them."""
    copies = {name: cloned(call[name]) for name in written(impl.op)}
    out = impl.fn(**(call | copies))
    return [*as_list(out), *dispatch.tensors_in(copies.values())] if copies else out


def cloned(value: Any) -> Any:
    """A tensor, or a list of tensors and others, with memory of its own."""
    if isinstance(value, list):
        return [cloned(each) for each in value]
    return value.clone() if isinstance(value, Tensor) else value


def spreads_of(op: str, call: Call, exact: Any) -> list[Callable[[], Tensor]]:
    """Return the spreads of the op's definition on `call`; `exact` is the definition in float64."""
    return spreads(exact, lambda: draws_of(lambda: reference(op, call)))


def assert_accurate(op: str, call: Call, out: Any, names: Sequence[str] | None = None) -> None:
    """Raise AssertionError, with the numbers, unless `out` keeps the accuracy rule as the result of `op` on `call`."""
    exact = reference(op, upcast(call))
    found = spreads_of(op, call, exact)
    assert_as_accurate(out, baseline=baseline(op, call), exact=exact, spreads=found, names=names)


def assert_right(case: Case, call: Call, out: Any) -> None:
    """Raise AssertionError, with the numbers, unless `out` is a right result of `case`, which was run on `call`."""
    Judge(case, call).assert_right(call, out)


class Judge:
    """Judge results of one call: what they are compared with is computed once, when it is first asked for.

    case: says by which rule.  call: the inputs; what the op writes is copied, and nothing of it may change while the
    judge is in use.
    """

    def __init__(self, case: Case, call: Call) -> None:
        self.case = case
        self.call = call | {name: cloned(call[name]) for name in written(case.op)}

    @functools.cached_property
    def _expected(self) -> list[Tensor]:
        return as_list(reference(self.case.op, self.call))

    @functools.cached_property
    def _baseline(self) -> list[Tensor]:
        return as_list(baseline(self.case.op, self.call))

    @functools.cached_property
    def _exact(self) -> list[Tensor]:
        return as_list(reference(self.case.op, upcast(self.call)))

    @functools.cached_property
    def _spreads(self) -> list[Callable[[], Tensor]]:
        return spreads_of(self.case.op, self.call, self._exact)

    @functools.cached_property
    def _value(self) -> tuple[Tensor, Tensor]:
        """Return what codes stand for, in float64, and the largest error of a faithful fp32 result of it."""
        assert self.case.value is not None, "a case judged by its codes says what value they stand for"
        op, call = self.case.value(self.call)
        call = cast(call, torch.float32)
        value = reference(op, upcast(call))
        if value.numel() == 0:
            return value, value
        return value, faithful_unit(value, torch.float32, spreads_of(op, call, value)[0]())

    def assert_right(self, call: Call, out: Any) -> None:
        """Raise AssertionError, with the numbers, unless `out`, and what the op wrote into `call`, are right."""
        outputs = as_list(out) + written_tensors(self.case.op, call)
        for i, (o, e) in enumerate(zip(outputs, self._expected, strict=True)):
            assert o.dtype == e.dtype, f"output {i} is {o.dtype}, expected {e.dtype}"
        if self.case.rule == "bits":
            assert_same_bits(outputs, self._expected)
            return
        names = [f"output {i}" for i in range(len(outputs))]
        base, exact, allowed = list(self._baseline), list(self._exact), list(self._spreads)
        if self.case.rule == "codes":
            self._assert_codes(outputs[0], outputs[1])
            names, outputs, base, exact, allowed = names[2:], outputs[2:], base[2:], exact[2:], allowed[2:]
        for i in reversed(range(len(as_list(out)), len(outputs))):
            if not outputs[i].is_floating_point():
                gap = (outputs.pop(i).int() - exact.pop(i).int()).abs()
                steps = int(gap.max()) if gap.numel() else 0
                assert steps <= 1, f"{names[i]}: codes are {steps} steps from exact"
                del names[i], base[i], allowed[i]
        assert_as_accurate(outputs, baseline=base, exact=exact, spreads=allowed, names=names)

    def _assert_codes(self, codes: Tensor, scale: Tensor) -> None:
        value, unit = self._value
        if value.numel() == 0:
            return
        largest, step = value.abs().amax(-1, keepdim=True), scale.double()
        _assert_near("scale·127", step * 127, largest, unit.amax(-1, keepdim=True) + SCALE_ROUNDING * largest)
        _assert_near("q·scale", codes * step, value, unit + CODE_ROUNDING * largest + step / 2)


def _assert_near(name: str, got: Tensor, exact: Tensor, allowed: Tensor) -> None:
    wrong = ~(((got - exact).abs() <= allowed) | (got.isnan() & exact.isnan()))
    if bool(wrong.any()):
        at = int(wrong.flatten().nonzero()[0])
        gap = float(allowed.expand_as(got).flatten()[at])
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {got.numel()} are wrong; at flat index {at} it is "
            f"{float(got.flatten()[at]):.9g}, exact is {float(exact.flatten()[at]):.9g}, within {gap:.3g} is allowed"
        )
