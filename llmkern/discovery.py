"""Folders as registries: every module in a folder is imported, so that adding a file adds its contents."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

__all__ = ["import_children"]


def import_children(package: str) -> list[ModuleType]:
    """Import each module and sub-package of `package` whose name does not begin with `_`; alphabetical order."""
    path = importlib.import_module(package).__path__
    names = sorted(info.name for info in pkgutil.iter_modules(path) if not info.name.startswith("_"))
    return [importlib.import_module(f"{package}.{name}") for name in names]
