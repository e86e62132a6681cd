"""Recognize the router of a mixture of experts.

Names propose: a weight [experts, hidden] and a `top_k`.  Probes decide: with weights whose logits are known it must
choose and weigh experts as a `route` step of a program does, whatever the logits' size, sign and dtype, and its source
and its operators decide nothing that the probes do not show.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern.programs.program import Option, Place, Step
from llmkern.programs.run import routed
from llmkern.swap.guard import UNSEEN, Part, noted
from llmkern.swap.match import PROBE_SCALE, agrees, stand_in, why_elsewhere
from llmkern.swap.packed_experts import MOVES, PRODUCTS, Operators
from llmkern.swap.track import Refused

__all__ = ["Router", "router_of"]

_ROUTING = frozenset(
    (
        "_softmax",
        "div",
        "div_",
        "gather",
        "masked_fill",
        "mul_",
        "scatter",
        "scatter_",
        "sigmoid",
        "sort",
        "sum",
        "topk",
    )
    + (*MOVES, *PRODUCTS)
)


class Router(NamedTuple):
    """A router.  options: of a `route` step, all but the correction.  correction: its name, None for none.
    returned: how many values it returns, and which of them are the experts' weights and their numbers.
    """

    options: dict[str, Option]
    correction: str | None
    returned: tuple[int, int, int]
    parts: tuple[Part, ...]


class _Scores(NamedTuple):
    """Probe of a router: logits of this spread around a shift.

    tied: scores may be equal, of which any are chosen.  Of bf16 rows, only those that choose the same are compared.
    """

    dtype: torch.dtype
    spread: float
    shift: float = 0.0
    tied: bool = False


_SCORES = (
    _Scores(torch.float32, 1.0),
    _Scores(torch.float32, 3.0),
    _Scores(torch.float32, 1.0, -60.0),
    _Scores(torch.float32, 1.0, 60.0, tied=True),
    _Scores(torch.float32, PROBE_SCALE, tied=True),
    _Scores(torch.bfloat16, 3.0, -10.0),
)
_TOKENS, _LATENT = 32, 3


def router_of(module: nn.Module) -> Router | None:
    """Return what a router computes, or None where it is no `route` step.

    Raises `Refused` where it may be something else on other inputs.
    """
    held: dict[str, Any] = {**module._parameters, **module._buffers}
    weight, top = module._parameters.get("weight"), vars(module).get("top_k")
    if weight is None or weight.dim() != 2 or not isinstance(top, int) or module._modules:
        return None
    others = [name for name, tensor in held.items() if tensor is not None and name not in ("weight", "bias")]
    if len(others) > 1 or any(held[name].shape != weight.shape[:1] for name in others):
        return None
    draw = torch.Generator().manual_seed(0)
    probes = [_routed_by(module, others, probe, draw) for probe in _SCORES]
    if any(probe is None for probe in probes):
        return None
    for step, correction in _route_steps(module, others, top):
        if all(probe is not None and probe.agrees(step, correction) for probe in probes):
            parts: list[Part] = []
            for probe in probes:
                found = None if probe is None else noted(probe.shell)
                if found is None or probe is None:
                    raise Refused(UNSEEN)
                reason = why_elsewhere(probe.shell, probe.x) or probe.foreign
                if reason:
                    raise Refused(reason)
                parts += found
            assert probes[0] is not None
            return Router(dict(step.options), others[0] if correction else None, probes[0].returned, tuple(parts))
    return None


def _route_steps(module: nn.Module, others: list[str], top: int) -> Iterator[tuple[Step, bool]]:
    """Yield what a router may compute, with whether its other tensor is a correction."""
    own = vars(module)
    scales = [None, *[v for v in own.values() if isinstance(v, float) and v != 1.0]]
    counts = [value for name, value in own.items() if "group" in name and type(value) is int]
    weight: Any = module._parameters["weight"]
    experts = weight.shape[0]
    groups = [(g, t) for g, t in itertools.permutations(counts, 2) if g > 1 and t <= g and experts % g == 0 < t]
    choices: Any = itertools.product(
        (False, True), (False, True), (False, True), (None, 1e-20), scales, [(None, None), *groups], (False, True)
    )
    for sigmoid, normalized, wide, eps, scale, (group_count, group_top), correction in choices:
        if (correction and not others) or (eps and not normalized):
            continue
        flags = {"sigmoid": sigmoid or None, "normalized": normalized or None, "wide": wide or None}
        step = Step(("r",), "route", ("x",), (Place("router"),)).with_options(
            top=top, eps=eps, scale=scale, groups=group_count, group_top=group_top, **flags
        )
        yield step, correction


class _Routed:
    """One run of a router: its inputs and what it has made of them."""

    def __init__(self, probe: _Scores, shell: nn.Module, x: Tensor, weights: tuple[Tensor, Any, Any]) -> None:
        self.probe, self.shell, self.x = probe, shell, x
        self.weight, self.bias, self.correction = weights
        self.foreign = ""
        self.returned = (0, 0, 0)
        self.dense = torch.empty(0)

    def run(self, top: int) -> bool:
        """Run the router; return whether it gives weights and numbers of `top` experts for each token."""
        with Operators() as operators:
            out: Any = type(self.shell).forward(self.shell, self.x)
        self.foreign = operators.reason("its router computes", _ROUTING)
        if not isinstance(out, tuple) or not all(isinstance(each, Tensor) for each in out):
            return False
        shaped = [i for i, each in enumerate(out) if each.shape == (_TOKENS, top)]
        floating = [i for i in shaped if out[i].is_floating_point()]
        whole = [i for i in shaped if out[i].dtype == torch.int64]
        if not floating or len(whole) != 1:
            return False
        self.returned = len(out), floating[-1], whole[0]
        rows = torch.zeros(_TOKENS, self.weight.shape[0])
        self.dense = rows.scatter(-1, out[whole[0]], out[floating[-1]].float())
        return True

    def agrees(self, step: Step, correction: bool) -> bool:
        """Check that the step gives the same weights."""
        wide = step.option("wide")
        x, weight, bias = [t.float() if wide and t is not None else t for t in (self.x, self.weight, self.bias)]
        assert x is not None
        assert weight is not None
        found = routed(step, F.linear(x, weight, bias), self.correction if correction else None)
        if self.probe.dtype != torch.float32:
            same = ((found != 0) == (self.dense != 0)).all(-1)
            near = (found - self.dense).abs() <= 2.0**-7 * found.amax(-1, keepdim=True)
            return bool(same.float().mean() >= 0.5) and bool(near[same].all())
        expected = found
        out, expected = [each.sort(-1).values if self.probe.tied else each for each in (self.dense, expected)]
        nowhere = out.isnan() & expected.isnan()
        return agrees(out.masked_fill(nowhere, 0.0), expected.masked_fill(nowhere, 0.0))


def _routed_by(module: nn.Module, others: list[str], probe: _Scores, draw: torch.Generator) -> _Routed | None:
    """Run a copy of the router whose logits are known; None where it cannot be run."""
    held: Any = module._parameters["weight"]
    experts, hidden = held.shape
    if hidden <= _LATENT:
        return None
    basis = torch.linalg.qr(torch.randn(hidden, _LATENT + 1, generator=draw)).Q.T
    rows = torch.cat((torch.randn(experts, _LATENT, generator=draw), torch.ones(experts, 1)), -1)
    states = torch.randn(_TOKENS, _LATENT, generator=draw) * probe.spread
    x = torch.cat((states, torch.full((_TOKENS, 1), probe.shift)), -1) @ basis
    bias = None if module._parameters.get("bias") is None else torch.randn(experts, generator=draw).to(probe.dtype)
    correction = torch.randn(experts, generator=draw) if others else None
    weight = (rows @ basis).to(probe.dtype)
    parameters = {"weight": weight, "bias": bias} | dict.fromkeys(others, correction)
    shell = stand_in(module, parameters={name: tensor for name, tensor in parameters.items() if tensor is not None})
    vars(shell)["_buffers"] = {}
    routed_by = _Routed(probe, shell, x.to(probe.dtype), (weight, bias, correction))
    try:
        return routed_by if routed_by.run(vars(module)["top_k"]) else None
    except Exception:  # made for something else
        return None
