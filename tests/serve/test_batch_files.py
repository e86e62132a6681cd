"""Slices of a batch job's files: every row once, read from anywhere, and written with its answer."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from llmkern.integrations.ray.files import check_names, format_of, inputs, is_openai_batch, slices

ROWS = [{"id": str(i), "prompt": f"row {i}"} for i in range(10)]
ROWS[3]["prompt"] = 'two\nlines, a comma and "quotes"'
ROWS[4]["prompt"] = "ünïcödé ✓"


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pytest.importorskip("pyarrow", reason="the extra ray is not installed")
    from pyarrow import Table
    from pyarrow.parquet import write_table

    write_table(Table.from_pylist(rows), path, row_group_size=3)
    return path


WRITERS = {".jsonl": jsonl, ".csv": table, ".parquet": parquet}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("size", [1, 3, 4, 10, 11])
def test_slices_have_every_row_once(tmp_path: Path, suffix: str, size: int) -> None:
    path = WRITERS[suffix](tmp_path / f"in{suffix}", ROWS)
    pieces = slices([path], size)
    assert [piece.number for piece in pieces] == list(range(-(-10 // size)))
    assert [row for piece in pieces for row in format_of(path).read(piece)] == ROWS
    # Each by itself, as a worker reads it.
    assert format_of(path).read(pieces[-1]) == ROWS[size * (len(pieces) - 1) :]


@pytest.mark.parametrize("suffix", WRITERS)
def test_answers_are_written_beside_their_rows(tmp_path: Path, suffix: str) -> None:
    path = WRITERS[suffix](tmp_path / f"in{suffix}", ROWS)
    piece = slices([path], 4)[1]
    good = {"output": 'a\n"b"', "finish_reason": "stop", "prompt_tokens": 3, "completion_tokens": 2, "error": None}
    target = tmp_path / f"out{suffix}"
    format_of(path).write(target, piece, "generate", [good, {"error": "no"}, good, good])
    whole = slices([target], 100)[0]
    found = format_of(target).read(whole)
    assert [row["prompt"] for row in found] == [row["prompt"] for row in ROWS[4:8]]
    assert [row["output"] or None for row in found if "output" in row][0] == 'a\n"b"'
    assert [row["error"] or None for row in found] == [None, "no", None, None]


def test_embeddings_keep_their_type(tmp_path: Path) -> None:
    path = parquet(tmp_path / "in.parquet", [{"n": 1, "text": "a"}, {"n": 2, "text": "b"}])
    (piece,) = slices([path], 10)
    answers = [{"embedding": [0.5, -1.0], "prompt_tokens": 1, "error": None}, {"error": "no"}]
    format_of(path).write(tmp_path / "out.parquet", piece, "embed", answers)
    from pyarrow.parquet import read_table

    found = read_table(tmp_path / "out.parquet")
    assert str(found.schema.field("embedding").type).startswith("list<")
    assert str(found.schema.field("error").type) == "string"
    assert found.column("embedding").to_pylist() == [[0.5, -1.0], None]
    assert found.column("n").to_pylist() == [1, 2]


def test_what_is_no_row_stays_beside_its_error(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": \n[1]\n{"output": "mine", "prompt": "b"}\n')
    pieces = slices([path], 2)
    assert [piece.count for piece in pieces] == [2, 2]
    target = tmp_path / "out.jsonl"
    format_of(path).write(target, pieces[0], "generate", [{"output": "x", "error": None}, {"error": "no"}])
    assert [json.loads(line) for line in target.read_text().splitlines()] == [
        {"prompt": "a", "output": "x", "error": None},
        {"input": '{"prompt":', "error": "no"},
    ]
    format_of(path).write(target, pieces[1], "generate", [{"error": "no"}, {"output": "x", "error": None}])
    assert [json.loads(line)["input"] for line in target.read_text().splitlines()] == [
        "[1]",
        {"output": "mine", "prompt": "b"},
    ]
    short = tmp_path / "in.csv"
    short.write_text("id,prompt\n1,a\n2\n")
    (piece,) = slices([short], 5)
    assert format_of(short).read(piece) == [{"id": "1", "prompt": "a"}, "2"]


def test_openais_batch_format_is_known(tmp_path: Path) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {}}
    assert is_openai_batch(jsonl(tmp_path / "batch.jsonl", [line]))
    assert not is_openai_batch(jsonl(tmp_path / "plain.jsonl", ROWS))
    assert not is_openai_batch(table(tmp_path / "plain.csv", ROWS))


def test_bad_input_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="INPUT .*none.jsonl does not exist"):
        inputs(tmp_path / "none.jsonl")
    (tmp_path / "in.txt").write_text("a")
    with pytest.raises(ValueError, match=r"expected \.jsonl or \.csv or \.parquet"):
        inputs(tmp_path / "in.txt")
    jsonl(tmp_path / "b.jsonl", ROWS)
    jsonl(tmp_path / "a.jsonl", ROWS)
    assert [path.name for path in inputs(tmp_path)] == ["a.jsonl", "b.jsonl"]
    taken = table(tmp_path / "c.csv", [{"prompt": "a", "error": "b"}])
    with pytest.raises(ValueError, match="has files of 2 formats"):
        inputs(tmp_path)
    with pytest.raises(ValueError, match="has the column 'error', which the output adds"):
        check_names(taken)
    (tmp_path / "d.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"d\.parquet cannot be read"):
        slices([tmp_path / "d.parquet"], 5)
