"""Rename values: `unique` gives each its own name, for passes to work on; `tidy` the names that a reader expects.

`tidy` names queries, keys and values q, k and v, what attends a, norms x, y, z, sums h, activations g, and what is
returned as the hidden states that come in.  A name is used again once nothing reads its older value.
"""

from __future__ import annotations

from dataclasses import replace

from llmkern.programs.program import ACTIVATIONS, Program, Step

__all__ = ["tidy", "unique"]

_NORMS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
_ROLES = ("q", "k", "v")
_KEEP_ROLES = ("rope", "append", "keep", "scale", "clamp")  # and norms


def unique(program: Program) -> Program:
    """Give every value that a step makes a name of its own: v0, v1, …"""
    names = {name: name for name in program.inputs}
    taken = set(program.inputs)
    steps, count = [], 0
    for step in program.steps:
        results = []
        for _ in step.results:
            while f"v{count}" in taken:
                count += 1
            results.append(f"v{count}")
            count += 1
        steps.append(step.renamed(names, tuple(results)))
        names.update(zip(step.results, results, strict=True))
    return Program(program.inputs, tuple(steps), names[program.result])


def tidy(program: Program) -> Program:
    """Rename values to what a reader expects."""
    program = unique(program)
    last = {name: index for index, step in enumerate(program.steps) for name in step.reads()}
    last[program.result] = len(program.steps)
    reserved = {place.path for step in program.steps for place in step.places}
    wanted = _wanted(program)
    holders = {name: name for name in program.inputs}  # the value that goes by a name
    names = {name: name for name in program.inputs}
    steps = []
    for index, step in enumerate(program.steps):
        results = []
        for value in step.results:
            for name in _candidates(wanted[value]):
                holder = holders.get(name)
                free = holder is None or last.get(holder, -1) <= index
                if free and name not in reserved and name not in results:
                    break
            holders[name] = value
            results.append(name)
        steps.append(step.renamed(names, tuple(results)))
        names.update(zip(step.results, results, strict=True))
    return replace(program, steps=tuple(steps), result=names[program.result])


def _candidates(name: str) -> list[str]:
    return [name, *[f"{name}{number}" for number in range(2, 100)]]


def _wanted(program: Program) -> dict[str, str]:
    """Return the name that each value should have."""
    roles: dict[str, str] = {}
    for step in reversed(program.steps):
        if step.op == "attention":
            roles.update(zip(step.values[:3], _ROLES, strict=True))
        elif step.op in _KEEP_ROLES or step.op in _NORMS:
            roles.update({v: roles[r] for v, r in zip(step.values, step.results, strict=False) if r in roles})
    norms = 0
    wanted = {}
    for step in program.steps:
        base = _base(step)
        if step.op in _NORMS:
            base = ("x", "y", "z", "w")[norms % 4]
            norms += step.results[0] not in roles
        for value in step.results:
            wanted[value] = roles.get(value, base)
        if step.op.startswith("add_"):
            wanted[step.results[1]] = "h"
    wanted[program.result] = program.inputs[0]
    return wanted


def _base(step: Step) -> str:
    if step.op in ("route", "experts"):
        return {"route": "r", "experts": "u"}[step.op]
    if step.op in ACTIVATIONS or step.op == "mul" or step.option("activation") is not None:
        return "g"
    if step.op == "add" or step.option("residual") is not None:
        return "h"
    return {"attention": "a", "linear": "u"}.get(step.op, "t")
