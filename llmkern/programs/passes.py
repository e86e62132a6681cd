"""Fuse steps of programs, on any device; every pass takes a program and returns an equivalent one.

    one product for several linear layers of one value      q, k, v = linear(x, q_proj, k_proj, v_proj)
    an activation, and its gate, behind the product         g       = linear(y, gate_proj, up_proj, activation=swiglu)
    one rotation of queries and keys                        q, k    = rope(q, k, cos, sin, dim=64)
    the residual behind the product                         h       = linear(a, o_proj, residual=hidden)
    a sum before a norm                                     y, h    = add_rms_norm(u, hidden, norm, eps=1e-06)
    codes where only int8 weights read what is made         x       = rms_norm(hidden, norm, eps=1e-06, codes)

A sum of several products is added up in another order, with fewer roundings; all else rounds where it did or nowhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from llmkern.programs.names import tidy, unique
from llmkern.programs.program import ACTIVATIONS, GATES, Place, Program, Step

__all__ = [
    "add_norms",
    "fused",
    "gates_and_activations",
    "one_product",
    "one_rotation",
    "quantized",
    "residuals",
]

_GATE_OF = {activation: gate for gate, activation in GATES.items()}


def fused(program: Program, takes_codes: Callable[[Place], bool] | None = None) -> Program:
    """Apply all passes in order.  takes_codes: whether a linear layer has int8 weights and reads int8 codes."""
    for step in (gates_and_activations, one_product, one_rotation, residuals, add_norms):
        program = step(program)
    return program if takes_codes is None else quantized(program, takes_codes)


def gates_and_activations(program: Program) -> Program:
    """Fuse `act(linear(x))`, and its product with another linear layer of x, into one step."""
    steps = _apart(unique(program))
    uses, makers = _uses(steps, program), _makers(steps)
    taken: dict[int, Step | None] = {}

    def linear(value: str) -> Step | None:
        """Return the plain linear layer that makes a value, if the value is read only once."""
        index = makers.get(value)
        step = None if index is None else steps[index]
        return step if step is not None and _is_plain_linear(step) and uses[value] == 1 else None

    for index, step in enumerate(steps):
        if step.op in ACTIVATIONS and (gate := linear(step.values[0])) is not None:
            taken[makers[gate.results[0]]] = None
            taken[index] = replace(gate, results=step.results).with_options(activation=step.op)
    for index, step in enumerate(steps):
        if step.op != "mul":
            continue
        for first, second in (step.values, step.values[::-1]):
            gate, up = taken.get(makers.get(first, -1)), linear(second)
            kind = None if gate is None else _GATE_OF.get(str(gate.option("activation")))
            if gate is None or up is None or kind is None or gate.values != up.values or uses[first] != 1:
                continue
            taken[makers[first]] = taken[makers[second]] = None
            both = replace(gate, results=step.results, places=(*gate.places, *up.places))
            taken[index] = both.with_options(activation=kind)
            break
    return _rebuilt(program, [taken.get(index, step) for index, step in enumerate(steps)])


def one_product(program: Program) -> Program:
    """Merge linear layers of the same value into one step."""
    steps = _apart(unique(program))
    by_value: dict[str, list[int]] = {}
    for index, step in enumerate(steps):
        if _is_plain_linear(step):
            by_value.setdefault(step.values[0], []).append(index)
    changed: list[Step | None] = list(steps)
    for indices in by_value.values():
        together = [steps[index] for index in indices]
        for index in indices:
            changed[index] = None
        changed[indices[0]] = replace(
            together[0],
            results=tuple([step.results[0] for step in together]),
            places=tuple([step.places[0] for step in together]),
        )
    return _rebuilt(program, changed)


def one_rotation(program: Program) -> Program:
    """Merge the rotations of queries and of keys into one step, at the position of the first."""
    steps = list(unique(program).steps)
    changed: list[Step | None] = list(steps)
    makers = _makers(steps)
    waiting: dict[object, int] = {}
    for index, step in enumerate(steps):
        if step.op != "rope" or len(step.values) != 3:
            continue
        before = waiting.setdefault((step.values[1:], step.options), index)
        if before == index or len(steps[before].results) > 1 or makers.get(step.values[0], -1) > before:
            continue
        made = [value for each in steps for value in each.results]
        both = sorted((steps[before], step), key=lambda rope: made.index(rope.values[0]))  # queries before keys
        results, rows = [rope.results[0] for rope in both], [rope.values[0] for rope in both]
        changed[index] = None
        changed[before] = replace(step, results=tuple(results), values=(*rows, *step.values[1:]))
        del waiting[step.values[1:], step.options]
    return _rebuilt(program, changed)


def residuals(program: Program) -> Program:
    """Fuse residual additions into the linear layers before them: each layer adds itself to the running sum."""
    program = unique(program)
    steps = list(program.steps)
    uses, makers = _uses(steps, program), _makers(steps)
    changed: list[list[Step]] = [[step] for step in steps]
    inner = {value for step in steps if step.op == "add" for value in step.values if uses[value] == 1}

    def leaves(value: str) -> list[str]:
        index = makers.get(value)
        if index is None or steps[index].op != "add" or value not in inner:
            return [value]
        changed[index] = []
        return [leaf for part in steps[index].values for leaf in leaves(part)]

    def product(value: str) -> tuple[Step, float | None, list[int]] | None:
        """Return the linear layer that makes a value which is read once, its multiplier, and the indices of both
        steps.
        """
        index, multiplier = makers.get(value), None
        indices = []
        if index is not None and steps[index].op == "scale" and uses[value] == 1:
            by = steps[index].option("by")
            if not isinstance(by, float):
                return None
            indices, multiplier = [index], by
            value = steps[index].values[0]
            index = makers.get(value)
        if index is None or uses[value] != 1 or not _is_plain_linear(steps[index]):
            return None
        return steps[index], multiplier, [*indices, index]

    for index, step in enumerate(steps):
        if step.op != "add" or (step.results[0] in inner and steps[_reader(steps, step.results[0])].op == "add"):
            continue
        parts = [leaf for value in step.values for leaf in leaves(value)]
        products = {leaf: found for leaf in parts if (found := product(leaf)) is not None}
        others = [leaf for leaf in parts if leaf not in products]
        ordered = sorted(products, key=lambda leaf: makers[leaf])
        if not others:
            others = [ordered.pop(0)]
            products.pop(others[0])
        made: list[Step] = []
        total, count = others[0], len(others) + len(ordered) - 1
        for number, leaf in enumerate([*others[1:], *ordered], 1):
            results = step.results if number == count else (f"{step.results[0]}_{number}",)
            if leaf in products:
                linear, multiplier, indices = products[leaf]
                for each in indices:
                    changed[each] = []
                made.append(replace(linear, results=results).with_options(residual=total, multiplier=multiplier))
            else:
                made.append(Step(results, "add", (total, leaf)))
            total = results[0]
        changed[index] = made
    return _rebuilt(program, [step for made in changed for step in made])


def add_norms(program: Program) -> Program:
    """Fuse a sum and the norm of it into one step."""
    program = unique(program)
    steps = list(program.steps)
    makers = _makers(steps)
    changed: list[Step | None] = list(steps)
    for index, step in enumerate(steps):
        if step.op not in ("rms_norm", "layer_norm") or step.option("dim") is not None:
            continue
        before = makers.get(step.values[0])
        add = None if before is None else changed[before]
        if add is None or add.op != "add" or before is None:
            continue
        if any(add.results[0] in between.reads() for between in steps[before:index]):
            continue
        left, right = add.values  # what came last first, as `add_rms_norm` has it
        values = (right, left) if makers.get(left, -1) < makers.get(right, -1) else (left, right)
        changed[before] = None
        changed[index] = replace(step, op=f"add_{step.op}", results=(*step.results, *add.results), values=values)
    return _rebuilt(program, changed)


def quantized(program: Program, takes_codes: Callable[[Place], bool]) -> Program:
    """Let norms and activations whose results only int8 linear layers read produce int8 codes."""
    program = unique(program)
    coding = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
    steps = []
    for step in program.steps:
        gives = step.op in coding or (step.op == "linear" and step.option("activation") is not None)
        readers = [reader for reader in program.steps if step.results[0] in reader.reads()]
        coded = [
            reader.op == "linear"
            and reader.option("residual") != step.results[0]
            and all(map(takes_codes, reader.places))
            for reader in readers
        ]
        per_head = step.option("dim") is not None
        if gives and not per_head and coded and all(coded) and step.results[0] != program.result:
            step = step.with_options(codes=True)
        steps.append(step)
    return tidy(replace(program, steps=tuple(steps)))


def _is_plain_linear(step: Step) -> bool:
    return step.op == "linear" and not step.options and len(step.places) == 1


def _apart(program: Program) -> list[Step]:
    """Split plain linear layers into one step for each place."""
    steps: list[Step] = []
    for step in program.steps:
        if step.op == "linear" and not step.options:
            for result, place in zip(step.results, step.places, strict=True):
                steps.append(replace(step, results=(result,), places=(place,)))
        else:
            steps.append(step)
    return steps


def _uses(steps: list[Step], program: Program) -> Counter[str]:
    """Count how often each value is read; returning the result counts as a read."""
    uses = Counter(value for step in steps for value in step.reads())
    uses[unique(program).result] += 1
    return uses


def _makers(steps: list[Step]) -> dict[str, int]:
    """Map each value to the index of the step that makes it."""
    return {value: index for index, step in enumerate(steps) for value in step.results}


def _reader(steps: list[Step], value: str) -> int:
    return next(index for index, step in enumerate(steps) if value in step.reads())


def _rebuilt(program: Program, steps: list[Step | None]) -> Program:
    kept = tuple([step for step in steps if step is not None])
    return tidy(replace(unique(program), steps=kept))
