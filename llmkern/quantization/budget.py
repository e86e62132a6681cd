"""Give the layers whose rounding costs the most narrower groups or more bits, within a mean number for a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from llmkern.nn import PackedLinear
from llmkern.packed import BLOCK
from llmkern.quantization.plan import Plan
from llmkern.quantization.schemes import GROUPS, Groups, Int4, Int5, Int6, Int8, LayerScheme

__all__ = ["bits_of", "widened"]

SQUARED_ERROR = {
    (4, 128): 1.0,
    (4, 64): 0.86,
    (4, 32): 0.70,
    (5, 128): 0.264,
    (5, 64): 0.221,
    (5, 32): 0.174,
    (6, 128): 0.068,
    (6, 64): 0.055,
    (6, 32): 0.043,
}
"""Squared error by bits and group size, relative to 4 bits in groups of 128: normally distributed weights, symmetric
levels.  int8 has next to none."""

Replan = Callable[[Plan, LayerScheme], Plan]


@dataclass(frozen=True)
class _Form:
    """A form that a layer can have.  bits: of its weight in all.  cost: what its rounding is expected to cost."""

    scheme: LayerScheme
    bits: float
    cost: float


def bits_of(scheme: LayerScheme) -> float:
    """Return the bits that a weight takes, with its share of the group's scale and zero point."""
    if isinstance(scheme, Int8):
        return 8 + 16 / BLOCK
    return scheme.code_bits + (16 if scheme.symmetric else 24) / scheme.group


def widened(plans: Iterable[Plan], costs: Mapping[nn.Module, float], scheme: Int4, replan: Replan) -> dict[Plan, Plan]:
    """Return what takes the place of some plans of one scheme, so that its `bits` are used where they help the most.

    costs: of each layer, as `sensitivity.divergences` gives them.  replan: makes the plan of a layer in another form.
    Forms are widened one by one, each time the one that takes the most off the cost for each bit that it adds.
    """
    forms = {plan: _forms(plan, scheme, costs[plan.layer.module]) for plan in plans if plan.layer.module in costs}
    now = {plan: choice[0] for plan, choice in forms.items()}
    left = sum((scheme.bits or 0.0) * _weights(plan) - form.bits for plan, form in now.items())
    while True:
        steps = [
            ((now[plan].cost - form.cost) / (form.bits - now[plan].bits), i, plan, form)
            for i, (plan, choice) in enumerate(forms.items())
            for form in choice
            if 0 < form.bits - now[plan].bits <= left and form.cost < now[plan].cost
        ]
        if not steps:
            break
        _, _, plan, form = max(steps, key=lambda step: step[:2])
        left -= form.bits - now[plan].bits
        now[plan] = form
    return {plan: _because(replan(plan, form.scheme)) for plan, form in now.items() if form is not forms[plan][0]}


def _because(plan: Plan) -> Plan:
    return replace(plan, row=replace(plan.row, reason="its rounding costs more than that of others"))


def _weights(plan: Plan) -> int:
    rows, columns = plan.layer.shape
    return rows * columns


def _forms(plan: Plan, scheme: Int4, cost: float) -> list[_Form]:
    """Return the forms of a layer, beginning with the one that it has."""
    assert isinstance(plan.replacement, PackedLinear)
    packed = plan.replacement.packed
    group = packed.k // packed.scale.shape[1]
    count = _weights(plan)
    groups = [size for size in reversed(GROUPS) if size <= group]
    schemes: list[Groups] = [replace(scheme, group=size) for size in groups]
    schemes += [wider(size, scheme.max_error, scheme.smooth) for wider in (Int5, Int6) for size in groups]
    unit = cost / SQUARED_ERROR[4, group]
    forms = [_Form(each, count * bits_of(each), unit * SQUARED_ERROR[each.code_bits, each.group]) for each in schemes]
    int8 = Int8(block=BLOCK, smooth=scheme.smooth)
    return [*forms, _Form(int8, count * bits_of(int8), 0.0)]
