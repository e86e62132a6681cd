"""`llmkern tune OP --device cpu`: find the sizes at which the native kernel is not slower than PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import llmkern.ops
from llmkern import _native, dispatch
from llmkern.backends.cpu._speed import MeasuredSizes, read_table, tables
from llmkern.dispatch import Implementation
from llmkern.registry import forget
from llmkern.testing.case import Make
from llmkern.why import builder

__all__ = ["SIZES", "Found", "tunable", "tune"]

SIZES = tuple(2**n for n in range(6, 21))
LONGEST_ROW = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOT_SLOWER = 0.97
"""Share of PyTorch's speed that counts as equal: runs differ by as much."""

ROUNDS = 15

Timer = Callable[[Callable[[], Any]], float]
"""Takes a call, returns its seconds."""


@dataclass(frozen=True)
class Found:
    """least, most: the sizes at which the kernel is taken.  speeds: relative to PyTorch's, by size."""

    name: str
    dtype: str
    least: int | None
    most: int | None
    speeds: dict[int, float]


def tunable() -> list[str]:
    """The ops whose native kernels have measured sizes."""
    return [op for op in dispatch.ops() for impl in _kernels(op) if isinstance(impl.slower, MeasuredSizes)]


def tune(op: str, path: Path, timer: Timer) -> Iterator[Found]:
    """Each variant and dtype of `op`, on the instruction set in use; the table in `path` is written after each."""
    if op not in tunable():
        raise ValueError(f"{op!r} has no sizes to tune on the CPU; these have: {', '.join(tunable())}")
    isa = _native.cpu_isa()
    if isa is None:
        raise ValueError(f"tune: {_native.reason()}")
    (kernel,) = _kernels(op)
    measured = kernel.slower
    assert isinstance(measured, MeasuredSizes)
    for variant in measured.variants or (None,):
        for dtype in DTYPES:
            options = {} if measured.variant is None else {measured.variant: variant}
            speeds = {size: _speed(op, kernel, size, dtype, options, timer) for size in SIZES}
            least, most = longest_run(speeds)
            found = Found(measured.name(variant), str(dtype).removeprefix("torch."), least, most, speeds)
            table = read_table(path)
            entry = table.setdefault(found.name, {}).setdefault(isa, {})
            entry[found.dtype] = [least, most]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
            yield found
    tables.cache_clear()
    forget()


def longest_run(speeds: Mapping[int, float]) -> tuple[int | None, int | None]:
    """The first and the last of the most sizes, one after the other, that are not slower; None at the ends of the list.

    Where every size is slower, no size is taken: (2⁶³ - 1, None).
    """
    sizes, best, begin = sorted(speeds), (0, 0), 0
    for end, size in enumerate(sizes, 1):
        if speeds[size] < NOT_SLOWER:
            begin = end
        elif end - begin > best[1] - best[0]:
            best = begin, end
    first, last = best
    if first == last:
        return 2**63 - 1, None
    return (sizes[first] if first > 0 else None), (sizes[last - 1] if last < len(sizes) else None)


def _kernels(op: str) -> Sequence[Implementation]:
    return [impl for impl in dispatch.implementations(op) if impl.backend.name == "cpu"]


def _speed(
    op: str, kernel: Implementation, size: int, dtype: torch.dtype, options: Mapping[str, Any], timer: Timer
) -> float:
    """The speed of the public function on the kernel over that on PyTorch's operators: dispatch costs both the same."""
    hidden = min(size, LONGEST_ROW)
    arguments = builder(op)(Make(dtype, "cpu", 0), size // hidden, hidden) | dict(options)
    public = getattr(llmkern.ops, op)
    before = dispatch.implementations(op)
    contenders = replace(kernel, slower=None), dispatch.implementation(op, "torch")
    seconds = [float("inf")] * 2
    try:
        with torch.no_grad():
            for _ in range(ROUNDS):
                for i, implementation in enumerate(contenders):
                    dispatch.replace_implementations(op, [implementation])
                    for _ in range(3):  # a form that came again is found sooner
                        public(**arguments)
                    seconds[i] = min(seconds[i], timer(lambda: public(**arguments)))
    finally:
        dispatch.replace_implementations(op, before)
    return seconds[1] / seconds[0]
