"""Report what `optimize_` did, module by module."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import nn

from llmkern.swap.derive import describe
from llmkern.table import collapse, render

__all__ = ["SwapReport", "SwapRow", "current", "forget_report", "record_report"]


@dataclass(frozen=True)
class SwapRow:
    """One place in the model.

    path: the module's name within the model.
    kind: norm, mlp, activation, rope, attention, experts, linear, layer, cache, loss.
    op: the llmkern op that serves it, "" where there is none.  action: "swapped" or "left".
    backend: the one that serves it here, for inputs of the parameters' dtype on their device, or the cache that a
        model makes; "" if left.
    reason: why it was left alone; "" if swapped.
    source: the file of the kernel or function that serves it, seen from the root of the repository; "" if left.
    program: of a layer that is swapped as a whole, what it computes (llmkern/programs/program.py); "" of others.
    """

    path: str
    kind: str
    op: str
    action: Literal["swapped", "left"]
    backend: str
    reason: str
    source: str = ""
    program: str = ""


@dataclass(frozen=True)
class SwapReport:
    """The rows of one `optimize_` call; prints as a table in which repeated layers take one line.

    moved_bytes: of weights that were copied to huge pages.
    """

    rows: tuple[SwapRow, ...]
    moved_bytes: int = 0

    @property
    def swapped(self) -> tuple[SwapRow, ...]:
        return tuple(row for row in self.rows if row.action == "swapped")

    @property
    def left(self) -> tuple[SwapRow, ...]:
        return tuple(row for row in self.rows if row.action == "left")

    def to_dict(self) -> dict[str, Any]:
        """`{"rows": [{"path", "kind", "op", "action", "backend", "reason", "source", "program"}],
        "moved_bytes": …}`."""
        return {"rows": [asdict(row) for row in self.rows], "moved_bytes": self.moved_bytes}

    def __iter__(self) -> Iterator[SwapRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = collapse(
            (row.path, (row.kind, row.op, row.action if row.action == "left" else row.backend, row.reason))
            for row in self.rows
        )
        cells = [(path, count, *rest) for path, count, rest, _ in lines]
        title = f"{len(self.swapped)} swapped, {len(self.left)} left alone"
        if self.moved_bytes:
            title += f"; {self.moved_bytes / 1e6:.0f} MB of weights moved to huge pages"
        table = render(title, ("module", "×", "kind", "op", "served by", "left alone because"), cells)
        programs = collapse((row.path, (row.program,)) for row in self.rows if row.program)
        return "\n".join([table, *[f"{path} {count}: {text}" for path, count, (text,), _ in programs]])


_reports: weakref.WeakKeyDictionary[nn.Module, SwapReport] = weakref.WeakKeyDictionary()
"""Beside the models, not in them: a pickle of an optimized model is one of the untouched model, readable without us."""


def record_report(model: nn.Module, report: SwapReport) -> None:
    """Keep the report of an `optimize_` call for `current`; its rows are of all that is swapped by then.

    Each swapped module prints by what it is served.
    """
    served: dict[str, list[str]] = {}
    for row in report.swapped:
        text = f"{row.op} on {row.backend}" if row.op else row.backend
        served.setdefault(row.path, []).append(f"{text}\n{row.program}" if row.program else text)
    for path, texts in served.items():
        describe(model.get_submodule(path), ", ".join(texts))
    earlier = _reports.get(model)
    _reports[model] = replace(report, moved_bytes=report.moved_bytes + (earlier.moved_bytes if earlier else 0))


def forget_report(model: nn.Module) -> None:
    """Drop the reports of the model and of everything within it."""
    for module in model.modules():
        _reports.pop(module, None)


def current(model: nn.Module) -> SwapReport | None:
    """Return the report of the last `optimize_` call, of `model` or of one within it (adapters wrap models).

    None before one, after `restore_`, and of a copy: a copy's report comes with the next `optimize_`, which changes
    nothing that is swapped already.
    """
    for prefix, module in model.named_modules():
        if (report := _reports.get(module)) is not None:
            rows = (replace(row, path=f"{prefix}.{row.path}".strip(".")) for row in report.rows)
            return replace(report, rows=tuple(rows)) if prefix else report
    return None
