"""Printing by commands: JSON on stdout for programs, progress on stderr for people."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["finite", "print_json", "say", "save", "task", "working"]

_stderr = Console(stderr=True, highlight=False, markup=False)


def print_json(value: Any) -> None:
    """JSON that every parser reads: numbers that are infinite or NaN become null."""
    print(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def save(path: Path, command: str, result: dict[str, Any]) -> None:
    """Write `result` with the command and the environment that it was measured in."""
    from llmkern.info import info

    environment = info().to_dict()
    del environment["library"]["path"]  # where it is on this machine means nothing on another
    content = {"command": command, "environment": environment, "result": result}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """`value` with None in place of every number that is infinite or NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str) -> None:
    """A line for people, on stderr."""
    _stderr.print(text, soft_wrap=True)


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show that `what` is going on: a spinner on a terminal, else one line."""
    if _stderr.is_terminal:
        with _stderr.status(what):
            yield
    else:
        say(what)
        yield


@contextlib.contextmanager
def task(what: str, every: float | None = None) -> Iterator[Callable[[int, int], None]]:
    """Yields `progress(done, total)`: a bar on a terminal, else one line, and one more each `every` seconds."""
    if not _stderr.is_terminal:
        say(what)
        yield (lambda done, total: None) if every is None else _lines(what, every)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_stderr, transient=True) as bar:
        identity = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(identity, completed=done, total=total)


def _lines(what: str, every: float) -> Callable[[int, int], None]:
    """A `progress` that prints lines, with the time that is left at the speed so far."""
    begin = said = time.monotonic()
    first: int | None = None

    def progress(done: int, total: int) -> None:
        nonlocal said, first
        first = done if first is None else first
        now = time.monotonic()
        if now - said >= every and done > first:
            left = (now - begin) * (total - done) / (done - first)
            say(f"{what}: {done} of {total}, {timedelta(seconds=round(left))} left")
            said = now

    return progress
