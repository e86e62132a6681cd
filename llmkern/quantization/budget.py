"""Give the layers whose rounding costs the most narrower groups or int8, within a mean number of bits for a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from llmkern.nn import PackedLinear
from llmkern.packed import BLOCK
from llmkern.quantization.plan import Plan
from llmkern.quantization.schemes import GROUPS, Int4, Int8

__all__ = ["bits_of", "widened"]

SQUARED_ERROR = {128: 1.0, 64: 0.86, 32: 0.70}
"""Squared error by group size, relative to groups of 128: normally distributed weights in symmetric int4.  int8 has
next to none."""

Replan = Callable[[Plan, Int4 | Int8], Plan]


@dataclass(frozen=True)
class _Form:
    """A form that a layer can have.  bits: of its weight in all.  cost: what its rounding is expected to cost."""

    scheme: Int4 | Int8
    bits: float
    cost: float


def bits_of(scheme: Int4 | Int8) -> float:
    """Return the bits that a weight takes, with its share of the group's scale and zero point."""
    if isinstance(scheme, Int8):
        return 8 + 16 / BLOCK
    return 4 + (16 if scheme.symmetric else 24) / scheme.group


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
    int4 = [replace(scheme, group=size) for size in reversed(GROUPS) if size <= group]
    forms = [
        _Form(each, count * bits_of(each), cost * SQUARED_ERROR[each.group] / SQUARED_ERROR[group]) for each in int4
    ]
    int8 = Int8(block=BLOCK, smooth=scheme.smooth)
    return [*forms, _Form(int8, count * bits_of(int8), 0.0)]
