"""Batch jobs: every row of some files answered once, by as many workers as the cluster gives (Ray Data).

The job's process cuts the input into slices, Ray's workers read and answer them, and each slice's output file takes
its place at once when the answers have come.  So a job that was killed has whole slices only; `resume` answers the
others.  A worker that dies is started again by Ray, and its slices with it.  The workers read the input themselves:
on a cluster it lies where all machines see it, as for Ray's own readers.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmkern.integrations.ray import cluster, require
from llmkern.integrations.ray.files import Slice, check_names, format_of, inputs, is_openai_batch, slices
from llmkern.integrations.ray.worker import TEXT_COLUMNS, Answering, Load, Worker
from llmkern.serve.options import ServeOptions

__all__ = ["Summary", "run_batch"]

_MANIFEST = "job.json"
_SLICE = 64  # rows
_MOST_SLICES = 4096  # then they are longer


@dataclass(frozen=True)
class Summary:
    """Result of a job.  rows: of the whole job; errors and tokens: of the rows that this run answered."""

    rows: int
    answered: int
    errors: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        new = "" if self.answered == self.rows else f", {self.answered} of them now"
        failed = f"{self.errors} row{'' if self.errors == 1 else 's'} with an error"
        speed = f"{self.tokens / self.seconds:.1f} tokens/s"
        return f"{self.rows} rows{new}, {failed}, {self.seconds:.1f} s, {speed}"


def run_batch(
    load: Load,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    options: ServeOptions | None = None,
    column: str | None = None,
    settings: dict[str, Any] | None = None,
    workers: tuple[int, int] = (1, 1),
    cpus: int | None = None,
    gpus: float = 0,
    address: str | None = None,
    resume: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Answer each row of `source` once, into the folder `target`.

    load: returns a model of transformers and its tokenizer; called in each worker.  A language model continues or
        answers the text, an encoder embeds it.
    source: a .jsonl, .csv or .parquet file, or a folder of such; or OpenAI's batch format in .jsonl.
    target: gets a file for each slice of rows, whose names sort as the rows do, and `job.json`.
    options: name, context and sequences at a time, as of the server.  settings: fields of each request, such as
        {"max_tokens": 64, "temperature": 0}; requests of OpenAI's batch format have their own.
    column: where the text, or the list of messages, is; None for the first of prompt, messages, text and input.
    workers: least and most, each with `cpus` CPUs (None: an equal share of a machine) and `gpus` GPUs.
    address: of a Ray cluster; None for the one that the process is connected to, or one of this machine's.
    resume: go on with the job in `target`.
    progress: called with the rows that are done and all rows.

    A row that cannot be answered has its sentence in `error`.  Raises ValueError and OSError for input that is not
    accepted, RuntimeError where the workers fail, ModuleNotFoundError without the extra `ray`.
    """
    require("a batch job", "data")
    least, most = workers
    if not 1 <= least <= most:
        raise ValueError(f"workers is {least}..{most}, expected at least 1, and the most last")
    started = time.monotonic()
    job = _Job(Path(source), Path(target), options or ServeOptions("model"), column, settings or {})
    pending = job.open(resume)
    answered = errors = tokens = 0
    total = sum(piece.count for piece in job.pieces)
    before = total - sum(piece.count for piece in pending)
    progress(before, total)
    if pending:
        with cluster(address) as machines:
            share = cpus or max(1, machines.cpus // -(-most // machines.count))
            answering = Answering(load, job.options, column, job.settings, job.openai, share)
            for number, task, answers in _answers(answering, pending, workers, share, gpus):
                job.keep(job.pieces[number], task, answers)
                answered += len(answers)
                errors += sum(_failed(answer) for answer in answers)
                tokens += sum(_tokens(answer) for answer in answers)
                progress(before + answered, total)
    return Summary(total, answered, errors, tokens, time.monotonic() - started)


class _Job:
    """Input and output of a job on disk."""

    def __init__(
        self, source: Path, target: Path, options: ServeOptions, column: str | None, settings: dict[str, Any]
    ) -> None:
        # Rows wait for each other: there is no client who would rather have an error than an answer.
        self.options = replace(options, max_queue=1 << 20, timeout=86_400.0)
        self.target, self.column, self.settings = target, column, settings
        self.paths = inputs(source)
        for path in self.paths:
            check_names(path)
        self.openai = is_openai_batch(self.paths[0])
        self._check_column()
        rows = sum(piece.count for piece in slices(self.paths, _SLICE))
        self.pieces = slices(self.paths, max(_SLICE, -(-rows // _MOST_SLICES)))
        if not self.pieces:
            raise ValueError(f"INPUT {source} has no rows")

    def _check_column(self) -> None:
        names = format_of(self.paths[0]).columns(self.paths[0])
        if names is not None and not ({self.column} if self.column else set(TEXT_COLUMNS)) & set(names):
            expected = self.column or " or ".join(TEXT_COLUMNS)
            raise ValueError(f"--column: INPUT {self.paths[0]} has the columns {', '.join(names)}, expected {expected}")

    def open(self, resume: bool) -> list[Slice]:
        """Make or check the output folder; returns the slices that it lacks."""
        manifest = self.target / _MANIFEST
        mine = {
            "input": [[path.name, path.stat().st_size] for path in self.paths],
            "model": self.options.name,
            "max_context": self.options.max_context,
            "column": self.column,
            "settings": self.settings,
        }
        if resume and manifest.is_file():
            there = json.loads(manifest.read_text())
            for key, value in mine.items():
                if there.get(key) != value:
                    raise ValueError(f"--resume: {self.target} has a job whose {key} is {there.get(key)}, not {value}")
        elif self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            hint = "--resume goes on with its job" if manifest.is_file() else "expected a new or empty folder"
            raise ValueError(f"OUTPUT {self.target} is there already: {hint}")
        else:
            self.target.mkdir(parents=True, exist_ok=True)
            _write_atomically(manifest, lambda path: path.write_text(json.dumps(mine, indent=2) + "\n"))
        for leftover in self.target.glob(".*.partial"):
            leftover.unlink()
        return [piece for piece in self.pieces if not self._file(piece).exists()]

    def keep(self, piece: Slice, task: str, answers: list[dict[str, Any]]) -> None:
        """Write a slice's output file."""
        form = format_of(Path(piece.path))
        _write_atomically(self._file(piece), lambda path: form.write(path, piece, task, answers))

    def _file(self, piece: Slice) -> Path:
        return self.target / f"part-{piece.number:06}{Path(piece.path).suffix}"


def _answers(
    answering: Answering, pending: list[Slice], workers: tuple[int, int], cpus: int, gpus: float
) -> Iterator[tuple[int, str, list[dict[str, Any]]]]:
    """Yield number, task and answers of each slice, in the order in which they arrive."""
    import ray.data
    from ray.exceptions import RayError

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = [{"slice": json.dumps(asdict(piece))} for piece in pending]
    answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Worker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=workers[0], max_size=workers[1]),
        fn_constructor_args=(answering,),
        num_cpus=cpus,
        num_gpus=gpus or None,
    )
    try:
        for row in answered.iter_rows():
            answers = json.loads(row["answers"])
            if row["task"] == "failed":
                message, of_input = answers
                raise ValueError(message) if of_input else RuntimeError(message)
            yield int(row["slice"]), row["task"], answers
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        raise RuntimeError(f"the job's workers failed: {' '.join(str(cause).split())[-300:]}") from error


def _failed(answer: dict[str, Any]) -> bool:
    response = answer.get("response")
    return answer["error"] is not None or (response is not None and response["status_code"] != 200)


def _tokens(answer: dict[str, Any]) -> int:
    """Count the tokens that a row took: generated ones, or for an embedding those that were read."""
    used = answer
    if "response" in answer:
        used = ((answer["response"] or {}).get("body") or {}).get("usage") or {}
    found: int = used.get("completion_tokens", used.get("prompt_tokens")) or 0
    return found


def _write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` fill a file beside `path`, which then takes its place."""
    scratch = path.with_name(f".{path.name}.partial")
    with contextlib.ExitStack() as undo:
        undo.callback(scratch.unlink, missing_ok=True)
        write(scratch)
        scratch.replace(path)
