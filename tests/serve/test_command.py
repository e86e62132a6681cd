"""`llmkern serve` and `llmkern bench serve`: bad input is one line, and what a load measures."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_server import Served, serving, tiny_model, tiny_tokenizer

from llmkern.bench.load import Load, measure
from llmkern.cli import run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--max-concurrent", "0"], "--max-concurrent is 0, expected 1 to 1024"),
        (["--max-queue", "-1"], "--max-queue is -1, expected 0 to 1048576"),
        (["--port", "70000"], "--port is 70000, expected 0 to 65535"),
        (["--timeout", "0"], "--timeout is 0.0, expected 0.1 to 86400"),
        (["--max-body", "3"], "--max-body is 3, expected 1024 to 1073741824"),
        (["--max-context", "1"], "--max-context is 1, expected 2 to 16777216"),
        (["--max-context", "1000"], "has 512 positions"),
        (["--api-key", ""], "--api-key is empty"),
        (["--quantize", "int3"], "--quantize is 'int3'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert run(["serve", str(checkpoint), *arguments]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("llmkern: ")
    assert sentence in line


def test_a_port_that_is_taken_is_one_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run(["serve", str(checkpoint), "--port", str(port)]) == 2
    assert f"--port is {port}, which cannot be taken on 127.0.0.1" in capsys.readouterr().err


def test_an_absent_package_is_a_sentence(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "uvicorn" else find(name))
        assert run(["serve", str(checkpoint)]) == 2
    assert "serving needs uvicorn, which is not installed: pip install 'llmkern[serve]'" in capsys.readouterr().err


def test_the_package_imports_nothing_of_the_extra() -> None:
    code = "import sys, llmkern, llmkern.serve, llmkern.cli; sys.exit(bool({'fastapi', 'openai'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def load(**changes: Any) -> Load:
    return Load(**({"model": "tiny", "prompts": ["a", "bc"], "clients": 2, "requests": 5, "answer": 8} | changes))


def test_a_load_counts_tokens_and_gaps(served: Served) -> None:
    found = asyncio.run(measure(served.url, load()))
    assert (len(found.answers), found.errors) == (5, [])
    assert [one.tokens for one in found.answers] == [8] * 5
    assert found.tokens_per_second == pytest.approx(40 / found.seconds)
    assert len(found.ttft_ms) == 5
    assert len(found.itl_ms) == 5 * 7
    assert min(found.itl_ms) >= 0


def test_a_load_counts_errors(served: Served) -> None:
    found = asyncio.run(measure(served.url, load(model="another", requests=2)))
    assert len(found.errors) == 2
    assert "status 404" in found.errors[0]
    nobody = asyncio.run(measure("http://127.0.0.1:9", load(requests=1)))
    assert nobody.errors


def test_bench_serve_writes_a_table_and_json(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "serve.json"
    sizes = ["--prompt-len", "8", "--new-tokens", "4", "--requests", "1", "--clients", "1,2"]
    with serving(tiny_model(), tiny_tokenizer()) as one:
        command = ["bench", "serve", str(checkpoint), *sizes, "--url", one.url, "--json", str(target)]
        assert run(command) == 0
    rows = json.loads(target.read_text())["rows"]
    assert {row["metric"] for row in rows} == {"throughput_tokens_per_s", "ttft_ms", "itl_ms"}
    assert {row["x"]["clients"] for row in rows} == {1, 2}
    assert all(row["p50"] > 0 and row["error"] is None for row in rows)
    assert "served: prompt_len 8" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--clients", "0"], "--clients is '0'"),
        (["--requests", "0"], "--requests is 0"),
        (["--servers", "nginx"], "--servers has 'nginx', expected some of llmkern, "),
        (["--url", "http://127.0.0.1:9", "--clients", "1"], "--url is http://127.0.0.1:9, which names no model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bench_serves_bad_input(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert run(["bench", "serve", str(checkpoint), "--prompt-len", "8", *arguments]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
