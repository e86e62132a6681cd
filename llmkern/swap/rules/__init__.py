"""One file for each kind of module.

A rule file has `SWITCHES`, the arguments of `optimize_` any of which turns it on (for layers that are swapped as a
whole: all of which together), and `find(module) -> Match | None`, which recognises a module: names of its parts
propose, what it computes on a probe decides, and the name of its class never counts.
"""

from __future__ import annotations

import functools
from types import ModuleType

from llmkern.discovery import import_children

__all__ = ["rules"]


@functools.cache
def rules() -> list[ModuleType]:
    """All rule files; when first asked for, as some of them build on what reads others' (llmkern/swap/parts.py)."""
    return import_children(__name__)
