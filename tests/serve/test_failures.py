"""One request's error ends that request; the worker's end is the server's; a signal lets answers finish."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from processes import process
from tiny_server import PATIENCE, Served, get, post, serving, tiny_model, tiny_tokenizer

from llmkern.serve import sampling

CHAT = "/v1/chat/completions"
POISON = "\x07"


def body(text: str, tokens: int = 20) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "temperature": 0,
        # Only printable answers, so that no answer is poison itself.
        "logit_bias": {"7": -100},
    }


def ask_all(served: Served, texts: list[str]) -> list[httpx.Response]:
    async def all_of_them() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE) as client:
            return await asyncio.gather(*[client.post(CHAT, json=body(text)) for text in texts])

    return asyncio.run(all_of_them())


def contents(answers: list[httpx.Response]) -> list[str]:
    return [answer.json()["choices"][0]["message"]["content"] for answer in answers]


def test_a_forward_that_fails_for_one_request_ends_that_one(tokenizer: Any) -> None:
    model = tiny_model()
    poison = tokenizer(POISON)["input_ids"][0]

    def refuse(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if (args[0] == poison).any():
            raise RuntimeError("no such embedding")

    with serving(model, tokenizer, max_concurrent=4) as served:
        texts = ["one", "two, which is longer", "three"]
        alone = contents([ask_all(served, [text])[0] for text in texts])
        model.model.embed_tokens.register_forward_pre_hook(refuse)
        answers = ask_all(served, [texts[0], texts[1], f"bad {POISON}", texts[2]])
        assert answers[2].status_code == 500
        assert "no such embedding" in answers[2].json()["error"]["message"]
        assert contents([answers[0], answers[1], answers[3]]) == alone
        served.wait_idle()
        assert get(served.url + "/health").status_code == 200


def test_sampling_that_fails_for_one_request_ends_that_one(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_one = sampling._draw_one

    def refuse(logits: torch.Tensor, history: sampling.History) -> Any:
        if 42 in history.sampling.logit_bias and len(history.counts) >= 3:
            raise ArithmeticError("no such token")
        return draw_one(logits, history)

    monkeypatch.setattr(sampling, "_draw_one", refuse)
    with serving(tiny_model(), tokenizer, max_concurrent=4) as served:

        async def three() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE) as client:
                bad = body("bad") | {"logit_bias": {"42": 1}}
                return await asyncio.gather(*[client.post(CHAT, json=each) for each in (body("one"), bad, body("two"))])

        answers = asyncio.run(three())
        assert [answer.status_code for answer in answers] == [200, 500, 200]
        assert "no such token" in answers[1].json()["error"]["message"]
        served.wait_idle()


def test_a_dead_worker_turns_health_red(tokenizer: Any) -> None:
    with serving(tiny_model(), tokenizer) as served:

        def die(*_: Any) -> Any:
            raise MemoryError("no pages")

        served.engine.manager.batch_processor.scheduler.schedule_batch = die
        answer = post(served.url + CHAT, json=body("x"), timeout=PATIENCE)
        assert answer.status_code in (500, 503)
        assert "no pages" in answer.json()["error"]["message"]
        give_up = time.monotonic() + PATIENCE
        while get(served.url + "/health").status_code != 503 and time.monotonic() < give_up:
            time.sleep(0.05)
        assert get(served.url + "/health").status_code == 503
        assert post(served.url + CHAT, json=body("x")).status_code == 503


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_sigterm_finishes_what_runs_and_exits_0(checkpoint: Path) -> None:
    with process([str(checkpoint), "--served-model-name", "tiny"]) as (server, url):
        assert get(url + "/health", timeout=PATIENCE).status_code == 200
        request = body("hello", 300) | {"stream": True}
        with httpx.stream("POST", url + CHAT, json=request, timeout=PATIENCE) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            data = [line.removeprefix("data: ") for line in lines if line]
        assert data[-1] == "[DONE]"
        assert json.loads(data[-2])["timings"]["predicted_n"] == 300
        assert server.wait(PATIENCE) == 0
        with pytest.raises(httpx.ConnectError):
            get(url + "/health")


def test_a_dead_worker_ends_the_process_with_an_error(checkpoint: Path) -> None:
    prelude = """
from transformers.generation.continuous_batching.scheduler import FIFOScheduler
schedule = FIFOScheduler.schedule_batch
def die(self, *args):
    if any(state.initial_tokens[:1] != [256] for state in self.waiting_requests.values()):  # not the warm-up
        raise MemoryError("no pages")
    return schedule(self, *args)
FIFOScheduler.schedule_batch = die
"""
    with process([str(checkpoint), "--served-model-name", "tiny"], prelude) as (server, url):
        answer = post(url + CHAT, json=body("x"), timeout=PATIENCE)
        assert answer.status_code in (500, 503)
        assert server.wait(PATIENCE) == 1
