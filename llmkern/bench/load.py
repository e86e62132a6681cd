"""A load on any server of OpenAI's API, and the numbers that `vllm bench serve` reports of it.

So many clients, each a closed loop: it asks, reads the stream, asks again.  Prompts and lengths of answers are the
same for every server, sampling is greedy.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Answered", "Load", "Measured", "measure"]


@dataclass(frozen=True)
class Load:
    """A load on a server.  clients: at a time; requests: in all; answer: tokens of each."""

    model: str
    prompts: Sequence[str]
    clients: int
    requests: int
    answer: int
    api_key: str | None = None
    timeout: float = 600.0


@dataclass
class Answered:
    """One request: seconds from asking to each piece of text, or the error."""

    times: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Measured:
    """All requests of a load, and the seconds from the first to the last."""

    answers: list[Answered]
    seconds: float

    @property
    def served(self) -> list[Answered]:
        """Requests answered without an error."""
        return [one for one in self.answers if one.error is None]

    @property
    def errors(self) -> list[str]:
        """Error messages of the requests that failed."""
        return [one.error for one in self.answers if one.error is not None]

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all clients."""
        return sum(one.tokens for one in self.served) / self.seconds

    @property
    def ttft_ms(self) -> list[float]:
        """Milliseconds from sending each request to its first piece of text."""
        return [1e3 * one.times[0] for one in self.served if one.times]

    @property
    def itl_ms(self) -> list[float]:
        """Between two pieces of text, of all requests."""
        return [1e3 * (b - a) for one in self.served for a, b in itertools.pairwise(one.times)]


async def measure(url: str, load: Load) -> Measured:
    """Ask the server at `url` (without /v1) by chat completions.  Raises nothing for a request that fails."""
    import httpx

    headers = {} if load.api_key is None else {"Authorization": f"Bearer {load.api_key}"}
    numbers = iter(range(load.requests))
    answers: list[Answered] = []
    limits = httpx.Limits(max_connections=load.clients, max_keepalive_connections=load.clients)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=load.timeout, limits=limits, trust_env=False
    ) as client:

        async def one_client() -> None:
            for number in numbers:
                answers.append(await _ask(client, load, load.prompts[number % len(load.prompts)]))

        begin = time.perf_counter()
        await asyncio.gather(*[one_client() for _ in range(load.clients)])
        return Measured(answers, time.perf_counter() - begin)


async def _ask(client: Any, load: Load, prompt: str) -> Answered:
    body = {
        "model": load.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": load.answer,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answered = Answered()
    begin = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            if stream.status_code != 200:
                await stream.aread()
                answered.error = f"status {stream.status_code}: {stream.text[:200]}"
                return answered
            async for line in stream.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    _note(answered, json.loads(line.removeprefix("data: ")), time.perf_counter() - begin)
    except Exception as error:
        answered.error = f"{type(error).__name__}: {error}"
    if answered.error is None and not answered.times:
        answered.error = "no text came"
    return answered


def _note(answered: Answered, chunk: dict[str, Any], at: float) -> None:
    if "error" in chunk:
        answered.error = str(chunk["error"].get("message", chunk["error"]))
    if chunk.get("usage"):
        answered.tokens = chunk["usage"]["completion_tokens"]
    for choice in chunk.get("choices") or ():
        delta = choice["delta"]
        # The chunk that says who speaks has no token; an empty piece of text has one (a part of a character).
        if not delta.get("role") or delta.get("content"):
            answered.times.append(at)
            # Servers that send no usage (transformers serve) send a token in each chunk.
            answered.tokens = max(answered.tokens, len(answered.times))
