"""Tile sizes: a small table by op, class of shapes and architecture, and the user's own from `llmkern tune`.

Nothing is measured while a model runs.  A class is a name that the op's launcher derives from the shapes; its entry
names an architecture, "gfx" for AMD's, or "*" for any other.  A tuned entry, for the very device, Triton and llmkern,
comes first.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
from collections.abc import Iterator
from pathlib import Path

from llmkern.backends.triton._launch import Target
from llmkern.config import settings

__all__ = ["DEFAULTS", "Config", "classes", "config", "forget", "override", "tuned_path"]

Config = dict[str, int]
"""Block sizes, num_warps and num_stages, by the names of the kernel's constexprs."""


def _matmul(m: int, n: int, k: int, warps: int, stages: int, group: int = 8) -> Config:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": group, "num_warps": warps, "num_stages": stages}


def _tile(m: int, n: int, warps: int, stages: int) -> Config:
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


def _keys(n: int, warps: int, stages: int) -> Config:
    return {"BLOCK_N": n, "num_warps": warps, "num_stages": stages}


# The interpreter's programs cost the same however many elements they have; small tiles there visit every edge.
_INTERPRETED: dict[str, Config] = {
    "int8_matmul": _matmul(16, 64, 64, 1, 1, group=2),
    "attention": _tile(32, 64, 1, 1),
    "attention_backward": _tile(32, 64, 1, 1),
    "attention_decode": _keys(16, 1, 1),
    "rope": {"ROWS": 64, "num_warps": 1, "num_stages": 1},
}
# "*" serves sm_80 and every architecture without an entry: its shared memory fits in the 99 KiB of sm_86 and sm_89.
_COMPILED: dict[str, dict[str, dict[str, Config]]] = {
    "int8_matmul": {
        "s8-16": {"*": _matmul(16, 32, 256, 4, 4), "gfx": _matmul(16, 64, 256, 4, 2)},
        "s8-64": {"*": _matmul(64, 64, 128, 4, 4), "gfx": _matmul(64, 64, 128, 4, 2)},
        "s8-many": {
            "*": _matmul(128, 128, 64, 8, 3),
            "sm90": _matmul(128, 128, 128, 8, 4),
            "gfx": _matmul(128, 128, 128, 8, 2),
        },
        "half-16": {"*": _matmul(16, 32, 128, 4, 4), "gfx": _matmul(16, 64, 128, 4, 2)},
        "half-64": {"*": _matmul(64, 64, 64, 4, 4), "gfx": _matmul(64, 64, 64, 4, 2)},
        "half-many": {"*": _matmul(128, 128, 32, 8, 4), "gfx": _matmul(128, 128, 64, 8, 2)},
        "fp32-16": {"*": _matmul(16, 32, 64, 4, 3)},
        "fp32-64": {"*": _matmul(32, 64, 32, 4, 3)},
        "fp32-many": {"*": _matmul(64, 64, 32, 8, 3)},
    },
    "attention": {
        "half-64": {"*": _tile(128, 64, 8, 3), "gfx": _tile(128, 64, 4, 1)},
        "half-128": {"*": _tile(128, 32, 8, 3), "sm90": _tile(128, 64, 8, 2), "gfx": _tile(128, 64, 4, 1)},
        "half-256": {"*": _tile(64, 32, 8, 2), "gfx": _tile(64, 32, 4, 1)},
        "fp32-64": {"*": _tile(64, 32, 8, 2), "gfx": _tile(64, 32, 4, 1)},
        "fp32-128": {"*": _tile(32, 32, 8, 2), "gfx": _tile(32, 32, 4, 1)},
        "fp32-256": {"*": _tile(16, 32, 8, 2), "gfx": _tile(16, 32, 4, 1)},
    },
    "attention_backward": {
        "half-64": {"*": _tile(32, 32, 4, 2), "sm90": _tile(64, 64, 8, 2), "gfx": _tile(32, 64, 4, 1)},
        "half-128": {"*": _tile(32, 64, 8, 2), "gfx": _tile(32, 64, 4, 1)},
        "half-256": {"*": _tile(16, 32, 8, 1), "gfx": _tile(16, 32, 4, 1)},
        "fp32-64": {"*": _tile(16, 32, 4, 1), "sm90": _tile(16, 32, 8, 1)},
        "fp32-128": {"*": _tile(32, 16, 4, 1), "sm90": _tile(16, 16, 8, 1), "gfx": _tile(16, 16, 4, 1)},
        "fp32-256": {"*": _tile(16, 16, 4, 1), "sm90": _tile(16, 16, 16, 1)},
    },
    "attention_decode": {
        "half-64": {"*": _keys(64, 4, 3), "gfx": _keys(64, 4, 1)},
        "half-128": {"*": _keys(64, 4, 3), "gfx": _keys(64, 4, 1)},
        "half-256": {"*": _keys(32, 4, 2), "gfx": _keys(32, 4, 1)},
        "fp32-64": {"*": _keys(32, 4, 2), "gfx": _keys(32, 4, 1)},
        "fp32-128": {"*": _keys(16, 8, 2), "gfx": _keys(16, 4, 1)},
        "fp32-256": {"*": _keys(16, 4, 1), "gfx": _keys(16, 8, 1)},
    },
    "rope": {"any": {"*": {"ROWS": 8, "num_warps": 4, "num_stages": 1}}},
}
DEFAULTS = {
    op: {shape_class: {**entry, "cpu": _INTERPRETED[op]} for shape_class, entry in table.items()}
    for op, table in _COMPILED.items()
}
"""Entries by op and class: an architecture's, "gfx" for AMD's, "*" for any other, "cpu" for the interpreter."""

_chosen: dict[tuple[str, str, Target], Config] = {}


def classes(op: str) -> tuple[str, ...]:
    """The classes of shapes of an op that has configurations; `ValueError` for one that has none."""
    if op not in DEFAULTS:
        raise ValueError(f"{op!r} has no configurations to tune; these have: {', '.join(DEFAULTS)}")
    return tuple(DEFAULTS[op])


def config(op: str, shape_class: str, target: Target) -> Config:
    """The configuration for a launch."""
    key = (op, shape_class, target)
    if key not in _chosen:
        table = DEFAULTS[op][shape_class]
        family = "gfx" if target.arch.startswith("gfx") else "*"
        built_in = table.get(target.arch) or table.get(family) or table["*"]
        _chosen[key] = _tuned(target).get(op, {}).get(shape_class) or built_in
    return _chosen[key]


@contextlib.contextmanager
def override(op: str, shape_class: str, target: Target, chosen: Config) -> Iterator[None]:
    """Within the block launches of the class use `chosen`."""
    key = (op, shape_class, target)
    before = config(*key)
    _chosen[key] = chosen
    try:
        yield
    finally:
        _chosen[key] = before


def forget() -> None:
    """Read the tuned tables again."""
    _chosen.clear()


def tuned_path(target: Target) -> Path:
    """Return the path where `llmkern tune` keeps its table: one file for each device, Triton and llmkern."""
    versions = [f"{package}-{importlib.metadata.version(package)}" for package in ("triton", "llmkern")]
    name = "_".join([re.sub(r"\W+", "-", target.name).strip("-").lower(), *versions])
    return Path(settings.cache).expanduser() / "triton" / f"{name}.json"


def _tuned(target: Target) -> dict[str, dict[str, Config]]:
    path = tuned_path(target)
    return json.loads(path.read_text()) if path.is_file() else {}
