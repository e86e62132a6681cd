"""One file for each kind of module.

A rule file has `SWITCHES`, the arguments of `optimize_` any of which turns it on (for layers that are swapped as a
whole: all of which together), and `find(module) -> Match | None`, which recognises a module: names of its parts
propose, what it computes on a probe decides, and the name of its class never counts.
"""

from __future__ import annotations

from llmkern.discovery import import_children

RULES = import_children(__name__)
