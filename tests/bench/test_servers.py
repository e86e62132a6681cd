"""The servers of `llmkern bench serve`: what starts them, and what is said where one does not start."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from llmkern.bench.peer import Unsupported
from llmkern.bench.schema import Row
from llmkern.bench.servers import Server, Setting, running, servers
from llmkern.bench.tables import tables

SETTING = Setting("demo:smollm2", "/a/folder", "bfloat16", clients=4, context=320, threads=1)


def test_names_are_told_apart_and_ours_is_first() -> None:
    names = [server.name for server in servers()]
    assert len(set(names)) == len(names)
    assert names[0] == "llmkern"


def test_commands_carry_the_setting() -> None:
    known = {server.name: server for server in servers()}
    ours = " ".join(known["llmkern int8"].command(SETTING, 7))
    assert "serve demo:smollm2 --port 7 --dtype bfloat16 --max-concurrent 4 --max-context 320 --quantize int8" in ours
    theirs = " ".join(known["transformers serve"].command(SETTING, 7))
    assert "serve /a/folder --continuous-batching --cb-num-blocks 8" in theirs


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_a_server_says_what_it_cannot_load() -> None:
    known = {server.name: server for server in servers()}
    with pytest.raises(Unsupported, match="Q8_0"):
        known["llama.cpp Q8_0 (xllamacpp)"].command(SETTING, 7)


def test_a_server_that_ends_says_its_last_line() -> None:
    program = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    broken = Server("broken", None, lambda setting, port: program, lambda setting: "x")
    with pytest.raises(RuntimeError, match="broken did not start: no such model"), running(broken, SETTING):
        pass


def test_the_table_has_a_line_for_each_server_and_load() -> None:
    def row(provider: str, clients: int, value: float) -> Row:
        detail = {"requests": 8, "errors": 0}
        x = {"clients": clients, "prompt_len": 128}
        return Row("serve", "tiny", provider, "throughput_tokens_per_s", x, p50=value, detail=detail)

    ((title, headers, cells),) = tables([row("a", 1, 10.0), row("a", 4, 20.0), row("b", 4, 30.0)])
    assert title == "tiny, served: prompt_len 128"
    assert [cell[:3] for cell in cells] == [
        ["a", "1", "10 (1.00×)"],
        ["a", "4", "20 (1.00×)"],
        ["b", "4", "30 (1.50×)"],
    ]
    assert len(headers) == len(cells[0])
