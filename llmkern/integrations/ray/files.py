"""Files of a batch job: rows in, rows with their answers out, in slices that are each written whole or not at all.

A slice is some consecutive rows of one file, read by seeking to its beginning.  Its output is a file of its own, so
that the files which are there say what is done.  The same three formats are read and written:

========  ==================================================================================================
jsonl     an object in each line; answers are further keys of it.  OpenAI's batch files are read and written as
          OpenAI does (https://platform.openai.com/docs/api-reference/batch)
csv       a header, then rows; all cells are text
parquet   columns of any type; they keep it
========  ==================================================================================================
"""

from __future__ import annotations

import abc
import csv
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ANSWERS", "Format", "Slice", "check_names", "format_of", "inputs", "is_openai_batch", "slices"]

# What an answer adds to a row, by task, with the types that pyarrow calls so.
ANSWERS = {
    "generate": {
        "output": "string",
        "finish_reason": "string",
        "prompt_tokens": "int64",
        "completion_tokens": "int64",
        "error": "string",
    },
    "embed": {"embedding": "list<float>", "prompt_tokens": "int64", "error": "string"},
}
_RESERVED = frozenset(itertools.chain.from_iterable(ANSWERS.values()))


@dataclass(frozen=True)
class Slice:
    """`count` rows of a file from `begin` on, a byte of jsonl and csv, a row of parquet.  number: within the job."""

    number: int
    path: str
    begin: int
    count: int


class Format(abc.ABC):
    """Finding, reading and writing the rows of one kind of file.  A row is a dict, or the text that is no row."""

    suffix: str

    @abc.abstractmethod
    def cut(self, path: Path, size: int) -> Iterator[tuple[int, int]]:
        """The beginning and the count of each `size` rows, fewer at the end."""

    @abc.abstractmethod
    def read(self, piece: Slice) -> list[dict[str, Any] | str]:
        """The rows of a slice."""

    @abc.abstractmethod
    def columns(self, path: Path) -> list[str] | None:
        """Names of the columns, or None for files whose rows each name their own."""

    @abc.abstractmethod
    def write(self, path: Path, piece: Slice, task: str, answers: list[dict[str, Any]]) -> None:
        """Write the slice's rows with their answers, which have keys of `ANSWERS[task]`."""


class JsonLines(Format):
    suffix = ".jsonl"

    def cut(self, path: Path, size: int) -> Iterator[tuple[int, int]]:
        begin = count = 0
        with path.open("rb") as file:
            for line in file:
                count += bool(line.strip())
                if count == size:
                    yield begin, count
                    begin, count = file.tell(), 0
        if count:
            yield begin, count

    def read(self, piece: Slice) -> list[dict[str, Any] | str]:
        with open(piece.path, "rb") as file:
            file.seek(piece.begin)
            lines = (line for line in file if line.strip())
            return [_object(line) for line in itertools.islice(lines, piece.count)]

    def columns(self, path: Path) -> list[str] | None:
        return None

    def write(self, path: Path, piece: Slice, task: str, answers: list[dict[str, Any]]) -> None:
        with path.open("w", encoding="utf-8") as file:
            for row, answer in zip(self.read(piece), answers, strict=True):
                # Nothing of a row is lost to an answer's key of the same name.
                spread = isinstance(row, dict) and not _RESERVED & row.keys()
                whole = answer if task == "openai" else {**(row if spread else {"input": row}), **answer}  # type: ignore[dict-item]
                file.write(json.dumps(whole, ensure_ascii=False) + "\n")


class Csv(Format):
    suffix = ".csv"

    def cut(self, path: Path, size: int) -> Iterator[tuple[int, int]]:
        with path.open("rb") as file:
            lines = _Lines(file)
            rows = csv.reader(lines)
            next(rows, None)
            begin = lines.end
            count = 0
            for row in rows:
                count += bool(row)
                if count == size:
                    yield begin, count
                    begin, count = lines.end, 0
            if count:
                yield begin, count

    def read(self, piece: Slice) -> list[dict[str, Any] | str]:
        names = self.columns(Path(piece.path))
        with open(piece.path, "rb") as file:
            file.seek(piece.begin)
            rows = (row for row in csv.reader(_Lines(file)) if row)
            return [
                dict(zip(names, row, strict=True)) if len(row) == len(names) else _as_csv(row)
                for row in itertools.islice(rows, piece.count)
            ]

    def columns(self, path: Path) -> list[str]:
        with path.open("rb") as file:
            return next(csv.reader(_Lines(file)), [])

    def write(self, path: Path, piece: Slice, task: str, answers: list[dict[str, Any]]) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            names = self.columns(Path(piece.path))
            table = csv.DictWriter(file, [*names, *ANSWERS[task]])
            table.writeheader()
            for row, answer in zip(self.read(piece), answers, strict=True):
                cells = row if isinstance(row, dict) else {names[0]: row}
                table.writerow({**cells, **{name: _cell(value) for name, value in answer.items()}})


class Parquet(Format):
    suffix = ".parquet"

    def cut(self, path: Path, size: int) -> Iterator[tuple[int, int]]:
        import pyarrow.parquet

        rows = pyarrow.parquet.read_metadata(path).num_rows
        for begin in range(0, rows, size):
            yield begin, min(size, rows - begin)

    def read(self, piece: Slice) -> list[dict[str, Any] | str]:
        found: list[dict[str, Any] | str] = self._table(piece).to_pylist()
        return found

    def columns(self, path: Path) -> list[str]:
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(path).names)

    def write(self, path: Path, piece: Slice, task: str, answers: list[dict[str, Any]]) -> None:
        import pyarrow
        import pyarrow.parquet

        table = self._table(piece)
        for name, kind in ANSWERS[task].items():
            numbers = pyarrow.list_(pyarrow.float32())
            dtype = numbers if kind == "list<float>" else pyarrow.type_for_alias(kind)
            table = table.append_column(name, pyarrow.array([answer.get(name) for answer in answers], dtype))
        pyarrow.parquet.write_table(table, path)

    def _table(self, piece: Slice) -> Any:
        """The slice as a pyarrow.Table, from those row groups that have rows of it."""
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(piece.path) as file:
            groups, first, end = [], None, 0
            for group in range(file.num_row_groups):
                begin, end = end, end + file.metadata.row_group(group).num_rows
                if begin < piece.begin + piece.count and end > piece.begin:
                    groups.append(group)
                    first = begin if first is None else first
            return file.read_row_groups(groups).slice(piece.begin - (first or 0), piece.count)


FORMATS: tuple[Format, ...] = (JsonLines(), Csv(), Parquet())


def format_of(path: Path) -> Format:
    """The format by the file's name.  Raises ValueError for another."""
    for each in FORMATS:
        if path.suffix == each.suffix:
            return each
    raise ValueError(f"INPUT is {path}, expected {' or '.join(each.suffix for each in FORMATS)}")


def inputs(source: Path) -> list[Path]:
    """The file, or all files of a folder in order of their names.

    Raises FileNotFoundError, and ValueError for files of another format, or of more than one.
    """
    if not source.exists():
        raise FileNotFoundError(f"INPUT {source} does not exist")
    if source.is_file():
        format_of(source)
        return [source.absolute()]
    found = sorted(path.absolute() for path in source.iterdir() if path.suffix in {each.suffix for each in FORMATS})
    suffixes = {path.suffix for path in found}
    if len(suffixes) != 1:
        raise ValueError(f"INPUT {source} has files of {len(suffixes)} formats, expected one of .jsonl, .csv, .parquet")
    return found


def slices(paths: list[Path], size: int) -> list[Slice]:
    """All rows in slices of `size`, none of which spans two files.  Raises ValueError for a file that is damaged."""
    found: list[Slice] = []
    for path in paths:
        try:
            for begin, count in format_of(path).cut(path, size):
                found.append(Slice(len(found), str(path), begin, count))
        except Exception as error:  # csv's and pyarrow's have types of their own
            raise ValueError(f"INPUT {path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    return found


def is_openai_batch(path: Path) -> bool:
    """Return True if the first line is a request of OpenAI's batch format."""
    if path.suffix != JsonLines.suffix:
        return False
    first = next(iter(JsonLines().read(Slice(0, str(path), 0, 1))), "")
    return isinstance(first, dict) and {"custom_id", "url", "body"} <= first.keys()


def check_names(path: Path) -> None:
    """Raise ValueError where a column has the name of an answer's."""
    names = format_of(path).columns(path) or []
    if clash := sorted(_RESERVED & set(names)):
        raise ValueError(f"INPUT {path} has the column {clash[0]!r}, which the output adds; rename it")
    if len(set(names)) < len(names):
        raise ValueError(f"INPUT {path} has two columns of one name")


class _Lines:
    """Lines of a binary file as text; `end`: the byte after the last one that was taken."""

    def __init__(self, file: Any) -> None:
        self._file, self.end = file, file.tell()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        text: str = line.decode("utf-8-sig" if self.end == 0 else "utf-8", "replace")
        self.end += len(line)
        return text


def _object(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    return row if isinstance(row, dict) else line.decode(errors="replace").strip()


def _as_csv(row: list[str]) -> str:
    return ",".join(row)


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value
