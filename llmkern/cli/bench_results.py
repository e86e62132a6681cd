"""Outputs of `llmkern bench`: JSON, tables, plots and pages, written when a run is interrupted too."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import typer

from llmkern.cli.output import print_json, say

if TYPE_CHECKING:
    from llmkern.bench.schema import Result

__all__ = ["Outputs", "kept_on_interrupt", "new_result", "recorded"]


def new_result(device: torch.device, further: dict[str, Any]) -> Result:
    """Return a result without rows, with the command line and the environment of the measurement."""
    from llmkern.bench.environment import environment
    from llmkern.bench.schema import Result

    return Result(shlex.join(["llmkern", *sys.argv[1:]]), environment(device) | further)


def recorded(
    record: Path | None, name: str, device: torch.device, as_json: Path | None, plot: Path | None
) -> tuple[Path | None, Path | None]:
    """Return the paths of JSON and plots: those given, else the ones of `--record`."""
    from llmkern.bench.environment import device_name, slug
    from llmkern.bench.readme import paths

    if record is None:
        return as_json, plot
    result, plots = paths(record, slug(device_name(device)), slug(name))
    return as_json or result, plot or plots


class Outputs:
    """Destinations of a result; a path that cannot be written is an error before anything is measured."""

    def __init__(self, as_json: Path | None, plot: Path | None, html: Path | None, as_csv: Path | None = None) -> None:
        from llmkern.bench import plots

        self.as_json, self.plot, self.html, self.as_csv = as_json, plot, html, as_csv
        if plot is not None and (reason := plots.missing()):
            raise ValueError(f"--plot: {reason}")
        for name, path in (("--json", as_json), ("--html", html), ("--csv", as_csv)):
            if path is not None and path.is_dir():
                raise ValueError(f"{name} is {path}, which is a folder; expected a file")

    def write(self, result: Result) -> None:
        from llmkern.bench.html import write_html
        from llmkern.bench.liger_csv import write_csv
        from llmkern.bench.plots import write_plots
        from llmkern.bench.tables import text

        if self.as_json is not None and str(self.as_json) == "-":
            print_json(result.to_dict())
        else:
            print(text(result.rows))
            for name, reason in result.environment["absent_peers"].items():
                print(f"{name} is absent: {reason}")
            for sentence in result.environment["left_out"]:
                print(f"left out: {sentence}")
        writers: list[tuple[Path | None, Callable[[Path, Result], Any]]] = [
            (self.as_csv, write_csv),
            (self.html, write_html),
            (self.plot, write_plots),
        ]
        if self.as_json is not None and str(self.as_json) != "-":
            result.save(self.as_json)
        for path, write in writers:
            if path is not None:
                write(path, result)


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what `timeout` and job schedulers send in place of Ctrl-C."""


@contextmanager
def kept_on_interrupt(result: Result, outputs: Outputs) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the measuring, not the run: what there is goes where it was to go.

    The exit status is 128 and the signal's number, as a shell has it: 130 or 143.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as interruption:
        result.environment["interrupted"] = True
        say(f"interrupted: {len(result.rows)} rows were measured")
        outputs.write(result)
        number = signal.SIGTERM if isinstance(interruption, _Terminated) else signal.SIGINT
        raise typer.Exit(128 + number) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    outputs.write(result)
