"""Requests that no well-behaved client makes, and what every other endpoint answers."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlparse

import httpx
import pytest
from tiny_server import PATIENCE, Served, get, serving, tiny_model

CHAT = "/v1/chat/completions"
GOOD: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


def post(served: Served, path: str, **options: Any) -> httpx.Response:
    return httpx.post(served.url + path, timeout=PATIENCE, **options)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 511}, "messages"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"258": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"chunk_size": 3}}, "stream_options.chunk_size"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"audio": {}}, "audio"),
        ({"beam_width": 3}, "beam_width"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_what_is_not_served_is_a_400_that_names_the_field(served: Served, change: dict[str, Any], field: str) -> None:
    answer = post(served, CHAT, json=GOOD | change)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == field
    assert field in error["message"]
    assert "\n" not in error["message"]


def test_fields_that_ask_for_nothing_are_accepted(served: Served) -> None:
    nothing = {"tools": None, "response_format": {"type": "text"}, "user": "me", "n": 1, "logprobs": False}
    assert post(served, CHAT, json=GOOD | nothing).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"nul", b"\xff\xfe", b"[" * 100_000, b'{"n": NaN}', b"3"])
def test_a_body_that_is_no_request_is_a_400(served: Served, body: bytes) -> None:
    answer = post(served, CHAT, content=body)
    assert answer.status_code == 400
    assert "body" in answer.json()["error"]["message"]


def test_a_body_past_the_limit_is_a_413(served: Served) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(6):
            yield b" " * (1 << 20)

    for content in (b" " * ((4 << 20) + 1), chunks()):
        assert post(served, CHAT, content=content).status_code == 413


def test_other_endpoints(served: Served) -> None:
    assert get(served.url + "/health").json() == {"status": "ok"}
    assert set(get(served.url + "/version").json()) == {"version"}
    assert get(served.url + "/nothing").status_code == 404
    assert get(served.url + CHAT).status_code == 405
    tokens = post(served, "/tokenize", json={"prompt": "héllo"}).json()
    assert (tokens["count"], tokens["max_model_len"]) == (6, 512)
    chat = post(served, "/tokenize", json={"messages": GOOD["messages"]}).json()
    assert chat["count"] == len("user: x\nassistant:")
    assert post(served, "/tokenize", json={}).status_code == 400
    assert post(served, "/v1/embeddings", json={}).status_code == 404  # a model that generates


def test_metrics_have_vllms_names(served: Served) -> None:
    prompt = {"messages": [{"role": "user", "content": "the same page twice " * 10}]}
    for _ in range(2):
        assert post(served, CHAT, json=GOOD | prompt).status_code == 200
    text = get(served.url + "/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    def value(name: str, labels: str = "") -> float:
        return float(values[f'llmkern:{name}{{{labels}model_name="tiny"}}'])

    assert value("num_requests_running") == value("num_requests_waiting") == 0
    assert 0 < value("kv_cache_usage_perc") <= 1
    assert value("prefix_cache_hits_total") >= 192  # 3 pages of 64 tokens
    assert value("prefix_cache_queries_total") > value("prefix_cache_hits_total")
    assert value("request_success_total", 'finished_reason="length",') >= 2
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time"):
        assert value(f"{name}_seconds_count") >= 2
    assert value("generation_tokens_total") >= 4
    assert value("prompt_tokens_total") >= 400


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_sees_tokens_as_they_come(served: Served) -> None:
    body = json.dumps(GOOD | {"stream": True, "max_tokens": 5})
    out = subprocess.run(
        ["curl", "-sN", served.url + CHAT, "-H", "Content-Type: application/json", "-d", body],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    ).stdout
    lines = out.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert [chunk["object"] for chunk in chunks] == ["chat.completion.chunk"] * 6
    assert chunks[-1]["timings"]["predicted_n"] == 5


def test_malformed_and_abandoned_requests_leave_the_server_well(served: Served) -> None:
    dice = random.Random(0)
    address = urlparse(served.url)
    good = json.dumps(GOOD | {"stream": True, "max_tokens": 200}).encode()

    def nonsense() -> bytes:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(good)}\r\n\r\n".encode()
        whole = head + good
        kind = dice.randrange(5)
        if kind == 0:  # an answer that nobody waits for
            return whole
        if kind == 1:  # half a request
            return whole[: dice.randrange(len(whole))]
        if kind == 2:  # some bytes are others
            damaged = bytearray(whole)
            for _ in range(dice.randrange(1, 6)):
                damaged[dice.randrange(len(damaged))] = dice.randrange(256)
            return bytes(damaged)
        if kind == 3:
            return dice.randbytes(dice.randrange(200))
        return head + dice.randbytes(len(good))

    statuses = set()
    for _ in range(120):
        with socket.create_connection((address.hostname, address.port), timeout=PATIENCE) as connection:
            connection.sendall(nonsense())
            if dice.random() < 0.3:
                connection.settimeout(0.2)
                try:
                    answer = connection.recv(64)
                except (TimeoutError, ConnectionError):
                    continue
                if answer:
                    statuses.add(int(answer.split()[1]))
    assert statuses <= {200, 400, 404, 405, 413, 422, 429, 501}
    served.wait_idle()
    assert get(served.url + "/health").status_code == 200
    assert post(served, CHAT, json=GOOD).status_code == 200


def test_a_full_queue_is_a_429_and_what_was_accepted_finishes(tokenizer: Any) -> None:
    with serving(tiny_model(), tokenizer, max_concurrent=2, max_queue=2) as served:

        async def ask_all() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE) as client:
                body = GOOD | {"max_tokens": 100, "temperature": 0}
                return await asyncio.gather(*[client.post(CHAT, json=body) for _ in range(16)])

        answers = asyncio.run(ask_all())
        statuses = sorted(answer.status_code for answer in answers)
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 4
        for answer in answers:
            if answer.status_code == 429:
                assert int(answer.headers["Retry-After"]) >= 1
                assert answer.json()["error"]["type"] == "rate_limit_error"
            else:
                assert answer.json()["usage"]["completion_tokens"] == 100
        served.wait_idle()
        rejected = f'llmkern:request_rejected_total{{model_name="tiny"}} {statuses.count(429)}.0'
        assert rejected in get(served.url + "/metrics").text


def test_a_key_is_asked_for(tokenizer: Any) -> None:
    with serving(tiny_model(), tokenizer, api_key="se cret") as served:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "se cret"}):
            answer = post(served, CHAT, json=GOOD, headers=headers)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
            assert get(served.url + "/v1/models", headers=headers).status_code == 401
        assert post(served, CHAT, json=GOOD, headers={"Authorization": "Bearer se cret"}).status_code == 200
        assert get(served.url + "/health").status_code == 200
        assert get(served.url + "/").status_code == 200


def test_a_request_that_takes_too_long_is_a_504(tokenizer: Any) -> None:
    with serving(tiny_model(), tokenizer, timeout=0.1) as served:
        step = served.engine.manager._on_step
        served.engine.manager._on_step = lambda arrived: (time.sleep(0.02), step(arrived))  # as a larger model does
        answer = post(served, CHAT, json=GOOD | {"max_tokens": 450})
        assert answer.status_code == 504
        assert "0.1 seconds" in answer.json()["error"]["message"]
        stream = post(served, CHAT, json=GOOD | {"max_tokens": 450, "stream": True})
        assert stream.status_code == 200
        assert "0.1 seconds" in stream.text
        assert stream.text.endswith("data: [DONE]\n\n")
        served.wait_idle()
