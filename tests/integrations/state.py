"""Everything that swapping may touch in a model, recorded, to tell an exact undo from a nearly exact one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

Snapshot = dict[str, dict[str, Any]]


def snapshot(model: nn.Module) -> Snapshot:
    """For every module its class and its whole `__dict__`: the objects themselves, containers also item by item."""
    return {path: _of_module(module) for path, module in model.named_modules(remove_duplicate=False)}


def assert_same(before: Snapshot, model: nn.Module) -> None:
    """Raise AssertionError naming the first thing that is not what it was."""
    after = snapshot(model)
    assert list(after) == list(before)
    for path, recorded in before.items():
        found = after[path]
        assert list(found) == list(recorded), f"{path}: attributes"
        for name, value in recorded.items():
            assert _same(found[name], value), f"{path}.{name} was {value!r}, is {found[name]!r}"


def _of_module(module: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {"object": module, "class": type(module), "forward": type(module).forward}
    for name, value in vars(module).items():
        state[name] = value
        if isinstance(value, dict):  # parameters, buffers, modules, every kind of hook
            state[f"{name} (items)"] = list(value.items())
        if hasattr(value, "to_dict"):
            state[f"{name} (as a dict)"] = repr(value.to_dict())
            state[f"{name} (class)"] = type(value)
            state[f"{name} (attention)"] = getattr(value, "_attn_implementation", None)
    return state


def _same(found: Any, recorded: Any) -> bool:
    if isinstance(recorded, list):
        return len(found) == len(recorded) and all(
            f[0] == r[0] and f[1] is r[1] for f, r in zip(found, recorded, strict=True)
        )
    return found is recorded or (isinstance(recorded, (str, int, float)) and found == recorded)


def outermost(rows: Iterable[Any]) -> list[Any]:
    """The rows that are not within a layer swapped as a whole: those whose ops each forward calls
    that is given no labels."""
    rows = list(rows)
    whole = tuple(f"{row.path}." for row in rows if row.kind == "layer")
    return [row for row in rows if row.kind != "loss" and not row.path.startswith(whole)]
