"""What was done to a model, kept with it: in its `__dict__`, so that copies and pickles of the model have it, too."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["forget", "keep", "kept"]


def keep(model: nn.Module, name: str, record: Any) -> None:
    """Keep `record` with the model, in place of an earlier one of that name."""
    model.__dict__[name] = record


def kept(model: nn.Module, name: str) -> tuple[str, Any] | None:
    """Return the path of the module, `model` or one within it (adapters wrap models), that has a record, and that."""
    return next(((path, vars(m)[name]) for path, m in model.named_modules() if name in vars(m)), None)


def forget(model: nn.Module, name: str) -> None:
    """Drop the records of that name, of the model and of everything within it."""
    for module in model.modules():
        vars(module).pop(name, None)
