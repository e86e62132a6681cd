"""`llmkern batch` on Ray: each row once, whoever is killed meanwhile."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stub_worker import StubWorker
from tiny_server import CONTEXT, tiny_model, tiny_tokenizer

from llmkern.cli import run
from llmkern.integrations.ray import batch
from llmkern.integrations.ray.batch import Summary, run_batch
from llmkern.serve.options import ServeOptions

pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def stubbed(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Summary]:
    """`run_batch` with workers that have no model."""
    monkeypatch.setattr(batch, "Worker", StubWorker)
    return lambda *args, **options: run_batch(tuple, *args, cpus=1, **options)


def questions(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"id": i, "prompt": f"question {i}"}) + "\n" for i in range(count)))
    return path


def output(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for part in sorted(folder.glob("part-*.jsonl")) for line in part.read_text().splitlines()]


def test_a_worker_that_is_killed_twice_loses_no_row(stubbed: Callable[..., Summary], tmp_path: Path) -> None:
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    for name in ("one", "two"):
        (deaths / name).touch()
    done: list[tuple[int, int]] = []
    source = questions(tmp_path / "in.jsonl", 300)
    summary = stubbed(
        source, tmp_path / "out", settings={"deaths": str(deaths)}, progress=lambda *numbers: done.append(numbers)
    )
    assert list(deaths.iterdir()) == []
    assert [row["id"] for row in output(tmp_path / "out")] == list(range(300))
    assert [row["output"] for row in output(tmp_path / "out")] == [str(i) for i in range(300)]
    assert (summary.rows, summary.answered, summary.errors, summary.tokens) == (300, 300, 0, 600)
    assert (done[0], done[-1]) == ((0, 300), (300, 300))


def test_a_job_that_is_killed_is_resumed(stubbed: Callable[..., Summary], ray_cluster: str, tmp_path: Path) -> None:
    source, target = questions(tmp_path / "in.jsonl", 400), tmp_path / "out"
    settings = {"seconds": 0.2}
    program = f"""
from llmkern.integrations.ray import batch
from stub_worker import StubWorker
batch.Worker = StubWorker
batch.run_batch(tuple, {str(source)!r}, {str(target)!r}, settings={settings}, cpus=1, address={ray_cluster!r})
"""
    job = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    try:
        give_up = time.monotonic() + 60
        while not list(target.glob("part-*")):
            assert job.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.02)
    finally:
        job.kill()
        job.wait()
    (target / ".part-000006.jsonl.partial").touch()  # what a kill between two system calls leaves
    before = {path: path.stat().st_mtime_ns for path in target.glob("part-*")}
    assert 0 < len(before) < 7
    with pytest.raises(ValueError, match="is there already: --resume goes on with its job"):
        stubbed(source, target, settings=settings)
    with pytest.raises(ValueError, match=r"--resume: .* has a job whose column is None, not id"):
        stubbed(source, target, settings=settings, column="id", resume=True)
    found = stubbed(source, target, settings=settings, resume=True)
    assert [row["id"] for row in output(target)] == list(range(400))
    assert found.answered == 400 - sum(len(path.read_text().splitlines()) for path in before)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sorted(path.name for path in target.iterdir() if not path.name.startswith("part-")) == ["job.json"]
    assert stubbed(source, target, settings=settings, resume=True).answered == 0


def test_a_model_answers_every_row(
    ray_cluster: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = questions(tmp_path / "in.jsonl", 20), tmp_path / "out"
    with source.open("a") as file:
        file.write("no row\n")
    assert run(["batch", str(checkpoint), str(source), str(target), "--max-new-tokens", "4", "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert (counted["rows"], counted["errors"], counted["tokens"]) == (21, 1, 80)
    assert [row.get("id") for row in output(target)] == [*range(20), None]
    assert all(row["completion_tokens"] == 4 and row["error"] is None for row in output(target)[:20])
    assert (output(target)[20]["input"], "output" in output(target)[20]) == ("no row", False)


def test_bad_input_is_one_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = questions(tmp_path / "in.jsonl", 3)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "words.csv").write_text("id,words\n1,a\n")
    for arguments, sentence in (
        ([str(checkpoint), "none.jsonl", "out"], "INPUT none.jsonl does not exist"),
        ([str(checkpoint), str(tmp_path / "empty.jsonl"), "out"], "has no rows"),
        ([str(checkpoint), str(tmp_path / "words.csv"), "out"], "has the columns id, words, expected prompt or"),
        ([str(checkpoint), str(source), str(tmp_path)], "is there already: expected a new or empty folder"),
        ([str(checkpoint), str(source), "out", "--workers", "2..1"], "--workers is '2..1'"),
        ([str(checkpoint), str(source), "out", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        ([str(checkpoint), str(source), "out", "--temperature", "-1"], "--temperature is -1.0"),
    ):
        assert run(["batch", *arguments]) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())


def test_workers_that_cannot_start_are_one_line(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = questions(tmp_path / "in.jsonl", 3)
    assert run(["batch", "./nowhere", str(source), str(tmp_path / "failed")]) == 2
    assert "llmkern: MODEL ./nowhere does not exist" in capsys.readouterr().err


def test_an_absent_package_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "ray" else find(name))
        assert run(["batch", "any", str(tmp_path / "in.jsonl"), "out"]) == 2
    assert "a batch job needs ray, which is not installed: pip install 'llmkern[ray]'" in capsys.readouterr().err


def test_workers_are_a_range(tmp_path: Path) -> None:
    source = questions(tmp_path / "in.jsonl", 1)
    with pytest.raises(ValueError, match=r"workers is 3\.\.2, expected at least 1, and the most last"):
        run_batch(tuple, source, tmp_path / "out", options=ServeOptions("tiny", CONTEXT), workers=(3, 2))
