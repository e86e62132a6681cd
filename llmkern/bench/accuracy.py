"""Accuracy checks of contenders, run before they are timed: a wrong kernel gets no time.

Whoever claims the op's own function keeps the rule that tests judge by (`llmkern.testing`): no less accurate than
PyTorch's operator against the reference in float64.  A peer that computes something near it, with another
quantization say, declares what it does instead; it has to be within 10% of the exact result, and its error is reported.
Calls too large for a float64 run are judged at reduced sizes; at the full ones the distance from PyTorch's result
then may be at most four times what it was there, plus one rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmkern.bench.sweep import Inputs, Point
from llmkern.testing.case import cases
from llmkern.testing.compare import as_list, assert_as_accurate, errors, spreads, upcast
from llmkern.testing.judge import assert_right, baseline, reference
from llmkern.testing.monte_carlo import draws_of

__all__ = ["Judge", "Wrong", "gradients"]

# Operations of the float64 reference, and elements of its arguments, beyond which sizes are reduced.
LARGEST = {"cpu": (2e9, 2**24), "cuda": (2e12, 2**28)}
APPROXIMATE_LIMIT = 0.1
GROWTH = 4.0


class Wrong(Exception):
    """The result is not right; the message has the numbers."""


def gradients(out: Any, call: dict[str, Any], leaves: tuple[str, ...]) -> list[Tensor]:
    """Return the gradients of fixed weights of every output, in the order of `leaves`."""
    given = [call[name] for name in leaves if isinstance(call[name], Tensor)]
    outputs = [o for o in as_list(out) if o.requires_grad]
    return list(torch.autograd.grad(outputs, given, [weights_like(o) for o in outputs], retain_graph=True))


def weights_like(output: Tensor) -> Tensor:
    """Return weights in place of the gradient that the rest of a model would send: the same values in every dtype."""
    generator = torch.Generator(output.device).manual_seed(1)
    values = torch.randn(output.shape, generator=generator, device=output.device)
    return values.bfloat16().to(output.dtype)


def _detached(call: dict[str, Any], leaves: tuple[str, ...]) -> dict[str, Any]:
    """The call on leaves of its own, so that each judged run has its own graph."""
    return {
        name: value.detach().requires_grad_(name in leaves and value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for name, value in call.items()
    }


class Judge:
    """Judges every contender of one point; what they share is computed once."""

    def __init__(self, point: Point) -> None:
        self.point = point
        self.template = cases(point.op)[0]
        self.full = point.inputs()
        self.reduced = self._too_large(self.full)
        self.inputs = point.inputs(reduced=True) if self.reduced else self.full

    def _too_large(self, inputs: Inputs) -> bool:
        operations, elements = LARGEST[self.point.device.type]
        tensors = [value for value in inputs.call.values() if isinstance(value, Tensor)]
        work = self.point.work(inputs.call, [])
        return work.operations > operations or sum(t.numel() for t in tensors) > elements

    def _results(self, run: Any, call: dict[str, Any]) -> list[Tensor]:
        """Outputs, or with a backward the gradients."""
        if self.point.mode == "forward":
            with torch.no_grad():
                return as_list(run(call))
        own = _detached(call, self.point.leaves)
        with torch.enable_grad():
            return gradients(run(own), own, self.point.leaves)

    @functools.cached_property
    def exact(self) -> list[Tensor]:
        return self._definition(upcast(self.inputs.call))

    def _definition(self, call: dict[str, Any]) -> list[Tensor]:
        return self._results(lambda call: reference(self.point.op, call), call)

    @functools.cached_property
    def spreads(self) -> list[Callable[[], Tensor]] | None:
        """Spread of the outputs under random rounding; gradients are compared with PyTorch's alone."""
        if self.point.mode != "forward":
            return None
        return spreads(self.exact, lambda: draws_of(lambda: self._definition(self.inputs.call)))

    @functools.cached_property
    def base(self) -> list[Tensor]:
        return self._results(lambda call: baseline(self.point.op, call), self.inputs.call)

    @functools.cached_property
    def full_base(self) -> list[Tensor]:
        return self._results(lambda call: baseline(self.point.op, call), self.full.call)

    def check(self, prepare: Any, approximate: str | None) -> dict[str, Any]:
        """The numbers, as a row carries them; raises `Wrong` where the contender is not right.

        prepare: takes `Inputs`, returns the function that computes from them.
        """
        out = self._run(prepare, self.inputs)
        found = self._near(out) if approximate else self._by_the_rule(out)
        if approximate:
            found["approximate"] = approximate
        if self.reduced:
            found["judged_at"] = {n: min(s, self.point.sweep.check.get(n, s)) for n, s in self.point.sizes.items()}
            small = _gap(out, self.base)
            large = _gap(self._run(prepare, self.full), self.full_base)
            allowed = GROWTH * small + torch.finfo(self.point.dtype).eps
            found["distance_from_torch"] = large
            if not large <= allowed:
                raise Wrong(f"at full size {large:.3g} from PyTorch's result, {allowed:.3g} is accepted")
        return found

    def _run(self, prepare: Any, inputs: Inputs) -> list[Tensor]:
        if self.point.mode == "forward":
            with torch.no_grad():
                return as_list(prepare(inputs)())
        own = Inputs(_detached(inputs.arguments, self.point.leaves), inputs.call)
        own.call = {name: own.arguments.get(name, value) for name, value in inputs.call.items()}
        with torch.enable_grad():
            return gradients(prepare(own)(), own.call, self.point.leaves)

    def _near(self, out: list[Tensor]) -> dict[str, Any]:
        error = _gap(out, self.exact)
        if not error <= APPROXIMATE_LIMIT:
            raise Wrong(f"relative error {error:.3g}, more than {APPROXIMATE_LIMIT:g}")
        return {"relative_error": error}

    def _by_the_rule(self, out: list[Tensor]) -> dict[str, Any]:
        out = _same_outputs(out, self.exact)
        try:
            if self.point.mode == "forward" and self.template.rule != "accuracy":
                assert_right(self.template, self.inputs.call, out)
                return {"rule": self.template.rule}
            assert_as_accurate(out, baseline=self.base, exact=self.exact, spreads=self.spreads)
        except AssertionError as error:
            raise Wrong(" ".join(str(error).split())[:300]) from None
        worst = max(errors(out, self.base, self.exact), key=lambda e: e.candidate / max(e.baseline, 1e-300))
        return {"error": worst.candidate, "baseline": worst.baseline}


def _same_outputs(out: list[Tensor], exact: list[Tensor]) -> list[Tensor]:
    """Append an output of 0 elements for each one not asked for, which a public function leaves out."""
    return out + [e.new_empty(0, dtype=e.dtype) for e in exact[len(out) :] if e.numel() == 0]


def _gap(out: list[Tensor], other: list[Tensor]) -> float:
    """‖out − other‖ / ‖other‖ of the worst output."""
    found = [0.0]
    for o, e in zip(_same_outputs(out, other), other, strict=True):
        if o.shape != e.shape:
            raise Wrong(f"shape {list(o.shape)}, expected {list(e.shape)}")
        if e.numel():
            wide = torch.float64 if e.dtype == torch.float64 else torch.float32
            norm = float(torch.linalg.vector_norm(e.to(wide)))
            distance = float(torch.linalg.vector_norm(o.to(wide) - e.to(wide)))
            found.append(distance / norm if norm > 0 else distance)
    worst = max(found)
    return worst if all(value == value for value in found) else float("nan")
