"""Replicas behind a front (Ray Serve): they follow the load, and one that is killed takes no answer with it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from openai import OpenAI
from tiny_server import CONTEXT, PATIENCE, tiny_model, tiny_tokenizer

from llmkern.cli import run
from llmkern.integrations.ray import run as replicas_run
from llmkern.integrations.ray.run import serving_replicas
from llmkern.serve.options import ServeOptions

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = pytest.mark.ray

CHAT = "/v1/chat/completions"


def body(text: str, tokens: int) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "temperature": 0,
    }


def slow(folder: str) -> tuple[Any, Any]:
    """Make a model whose steps take as long as a larger one's; the folder gets a file named by the process."""
    (Path(folder) / str(os.getpid())).touch()
    model = tiny_model()
    model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    return model, tiny_tokenizer()


class Replicated:
    """Server of several replicas: its address, and the folder in which they leave their process numbers."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder

    def pids(self) -> list[int]:
        return [pid for pid in (int(file.name) for file in self.folder.iterdir()) if _runs(pid)]

    def metrics(self) -> str:
        return httpx.get(self.url + "/metrics").text

    def replicas(self) -> int:
        found = re.search(r"^llmkern:replicas (\S+)$", self.metrics(), re.MULTILINE)
        assert found is not None
        return int(float(found[1]))

    def until(self, replicas: int, also: Callable[[], bool] = lambda: True) -> None:
        """Wait until so many report their load."""
        end = time.monotonic() + PATIENCE
        while not (also() and self.replicas() == replicas):
            assert time.monotonic() < end, f"{self.replicas()} replicas, not {replicas}"
            time.sleep(0.1)

    async def ask(self, texts: list[str], tokens: int) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE) as client:
            return await asyncio.gather(*[client.post(CHAT, json=body(text, tokens)) for text in texts])


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_replicas_follow_the_load_and_one_that_is_killed_takes_no_whole_answer_with_it(
    ray_cluster: str, tmp_path: Path
) -> None:
    """One test, because a cluster, a front and a first replica take longer than all that is asked of them."""
    options = ServeOptions("tiny", CONTEXT, port=0, max_concurrent=8, max_queue=60, timeout=60)
    delays = {"upscale_delay_s": 0.5, "downscale_delay_s": 1.0, "look_back_period_s": 1.0}
    make = functools.partial(slow, str(tmp_path))
    with contextlib.ExitStack() as running:
        serving = serving_replicas(make, options, (1, 2), cpus=1, target_ongoing_requests=2, **delays)
        replicated = Replicated(running.enter_context(serving), tmp_path)
        _answers_as_one_server(replicated)
        replicated.until(1)
        texts = [f"text {i}" for i in range(6)]
        before, after, ends = asyncio.run(_under_load(replicated, texts))
        assert {answer.status_code for answer in (*before, *after)} == {200}
        said = [answer.json()["choices"][0]["message"]["content"] for answer in (*before, *after)]
        assert said == said[: len(texts)] * (len(said) // len(texts))  # whoever answers, and however often it is asked
        assert any("the replica of this stream has died" in end for end in ends)
        assert any(end == "data: [DONE]" for end in ends)
        assert re.search(r"^llmkern:front_retries_total [1-9]", replicated.metrics(), re.MULTILINE)
        replicated.until(1)
        assert _last_line_of_a_stream(replicated, running.close) == "data: [DONE]"
    with pytest.raises(httpx.ConnectError):
        httpx.get(replicated.url + "/health")


def _answers_as_one_server(replicated: Replicated) -> None:
    client = OpenAI(base_url=f"{replicated.url}/v1", api_key="any", max_retries=0, timeout=60)
    assert [model.id for model in client.models.list()] == ["tiny"]
    alone = client.chat.completions.create(**body("hello", 8)).choices[0].message.content
    stream = client.chat.completions.create(**body("hello", 8), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == alone
    refused = httpx.post(replicated.url + CHAT, json=body("hello", 8) | {"tools": [1]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")
    assert httpx.get(replicated.url + "/health").json() == {"status": "ok"}


async def _under_load(
    replicated: Replicated, texts: list[str]
) -> tuple[list[httpx.Response], list[httpx.Response], list[str]]:
    """Ask until there are two replicas, kill one of them with requests on both, and ask until there are two again.

    Returns the whole answers before and after that, and the last line of each stream.
    """
    before = await _ask_until(replicated, 2, texts)
    for name in ("process_cpu_percent", "process_resident_memory_bytes", "num_requests_waiting"):
        assert len(re.findall(rf'^llmkern:{name}{{.*replica="', replicated.metrics(), re.MULTILINE)) == 2
    begun: asyncio.Queue[None] = asyncio.Queue()

    async def stream() -> str:
        async with (
            httpx.AsyncClient(base_url=replicated.url, timeout=PATIENCE) as client,
            client.stream("POST", CHAT, json=body("hello", 200) | {"stream": True}) as answer,
        ):
            lines = answer.aiter_lines()
            await anext(lines)
            begun.put_nowait(None)
            return [line async for line in lines if line][-1]

    streams = [asyncio.create_task(stream()) for _ in texts]
    for _ in streams:
        await begun.get()
    asking = asyncio.create_task(replicated.ask(texts * 2, 40))  # more than run at a time: some wait on each
    await asyncio.sleep(0.3)
    assert not asking.done()
    os.kill(replicated.pids()[0], signal.SIGKILL)
    after, ends = await asking, await asyncio.gather(*streams)
    after += await _ask_until(replicated, 2, texts, also=lambda: len(replicated.pids()) == 2)
    return before, after, ends


async def _ask_until(
    replicated: Replicated, replicas: int, texts: list[str], also: Callable[[], bool] = lambda: True
) -> list[httpx.Response]:
    answers: list[httpx.Response] = []
    there = asyncio.create_task(asyncio.to_thread(replicated.until, replicas, also))
    while not there.done():
        answers += await replicated.ask(texts, 40)
    await there
    return answers


def _last_line_of_a_stream(replicated: Replicated, meanwhile: Callable[[], None]) -> str:
    with httpx.stream("POST", replicated.url + CHAT, json=body("hello", 100) | {"stream": True}, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        other = threading.Thread(target=meanwhile)
        other.start()
        last = [line for line in lines if line][-1]
    other.join(60)
    return last


def test_a_replica_that_cannot_start_is_one_line() -> None:
    said = """The deployment failed to start 1 times in a row. Error:
[36mray::ServeReplica:llmkern:Replica.initialize_and_get_metadata()[39m (pid=7, ip=127.0.0.1)
  File "replica.py", line 1, in initialize
RuntimeError: Traceback (most recent call last):
  File "deployment.py", line 2, in __init__
ValueError: MODEL ./nowhere does not exist
"""
    application = SimpleNamespace(deployments={"Replica": SimpleNamespace(message=said)})
    serve = SimpleNamespace(status=lambda: SimpleNamespace(applications={"llmkern": application}))
    found = replicas_run.explained(serve, RuntimeError("Deploying application llmkern failed"))
    assert (type(found), str(found)) == (ValueError, "MODEL ./nowhere does not exist")


def test_a_signal_waits_for_what_runs_and_a_second_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    @contextlib.contextmanager
    def serving(*args: Any, hurry: threading.Event, **options: Any) -> Iterator[str]:
        before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the signal reached Ray"))  # as ray.init does
        yield "http://here"
        seen.append(hurry.is_set())
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append(hurry.wait(10))
        signal.signal(signal.SIGTERM, before)

    monkeypatch.setattr(replicas_run, "serving_replicas", serving)
    options = ServeOptions("tiny", CONTEXT)
    end = replicas_run.run_replicas(tuple, options, (1, 1), lambda url: os.kill(os.getpid(), signal.SIGTERM))
    assert (end, seen) == (0, [False, True])


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in (
        (["--replicas", "0..2"], "--replicas is '0..2', expected a number of at least 1"),
        (["--replicas", "2", "--cpus", "0"], "--cpus is 0, expected at least 1"),
        (["--cpus", "2"], "--cpus is 2, expected --replicas with it"),
    ):
        assert run(["serve", "any", *arguments]) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())
