"""Answer the rows of a batch job with the server's application, called in its own process.

So a row gets what a request gets: continuous batching with the rows beside it, the same checks and sentences, errors
that are its own.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkern.integrations.ray.files import Slice, format_of
from llmkern.serve.options import ServeOptions

__all__ = ["Answering", "Failure", "Worker"]

TEXT_COLUMNS = ("prompt", "messages", "text", "input")
_URL = {"generate": "/v1/completions", "chat": "/v1/chat/completions", "embed": "/v1/embeddings"}

Load = Callable[[], tuple[Any, Any]]


@dataclass(frozen=True)
class Answering:
    """Settings by which rows are answered.

    load: returns the model and its tokenizer, in the worker's process.  column: where the text is; None for the first
    of TEXT_COLUMNS that a row has.  settings: further fields of each request to a language model, as OpenAI names
    them.  openai: rows are requests of OpenAI's batch format.  threads: of PyTorch, 0 for its own number.
    """

    load: Load
    options: ServeOptions
    column: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    openai: bool = False
    threads: int = 0


class Failure(Exception):
    """A worker cannot go on; `of_input` where something that the user gave is at fault."""

    def __init__(self, message: str, of_input: bool) -> None:
        super().__init__(message)
        self.of_input = of_input


class Worker:
    """A model that answers slices of rows.  Made once for each actor of Ray Data's pool; `close` ends it."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        # An actor whose constructor raises is started again and again: the first slice says what is wrong.
        self._failure: Failure | None = None
        try:
            self._run(self._start())
        except Exception as error:
            of_input = isinstance(error, (ValueError, TypeError, OSError, ModuleNotFoundError))
            name = "" if of_input else f"{type(error).__name__}: "
            self._failure = Failure(f"{name}{error}", of_input)

    def __call__(self, batch: dict[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Answer the slices of a column `slice` (JSON); returns columns `slice`, `task` and `answers` (JSON)."""
        if self._failure is not None:
            return {
                "slice": [-1],
                "task": ["failed"],
                "answers": [json.dumps([str(self._failure), self._failure.of_input])],
            }
        pieces = [Slice(**json.loads(text)) for text in batch["slice"]]
        answers = [self.answer(piece) for piece in pieces]
        return {
            "slice": [piece.number for piece in pieces],
            "task": [self.task] * len(pieces),
            "answers": [json.dumps(each, ensure_ascii=False) for each in answers],
        }

    def answer(self, piece: Slice) -> list[dict[str, Any]]:
        """Return an answer for each row of the slice.  Raises RuntimeError if the model's worker has died."""
        from pathlib import Path

        rows = format_of(Path(piece.path)).read(piece)
        numbers = [f"{piece.number}-{i}" for i in range(len(rows))]
        return self._run(self._answer_all(rows, numbers))

    def close(self) -> None:
        """End the model's worker and the thread."""
        if self._failure is None:
            self._run(self._lifespan.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _start(self) -> None:
        import httpx
        import torch

        from llmkern.serve.app import create_app

        if self._answering.threads:
            torch.set_num_threads(self._answering.threads)
        model, tokenizer = self._answering.load()
        self.app = create_app(model, tokenizer, self._answering.options)
        self._lifespan = self.app.router.lifespan_context(self.app)
        await self._lifespan.__aenter__()
        self._kind = "embed"
        if model.can_generate():
            self._kind = "chat" if getattr(tokenizer, "chat_template", None) else "generate"
        self.task = "openai" if self._answering.openai else "embed" if self._kind == "embed" else "generate"
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://worker")
        # Some more than are generated at a time, so that no step waits for a tokenizer.
        self._places = asyncio.Semaphore(2 * self._answering.options.max_concurrent)

    async def _answer_all(self, rows: list[Any], numbers: list[str]) -> list[dict[str, Any]]:
        answer = self._openai if self._answering.openai else self._plain
        found = await asyncio.gather(*[answer(row, number) for row, number in zip(rows, numbers, strict=True)])
        if self.app.state.engine.dead:
            raise RuntimeError("the model's worker has died")
        return list(found)

    async def _plain(self, row: Any, number: str) -> dict[str, Any]:
        try:
            url, body = self._request(row)
        except ValueError as error:
            return {"error": str(error)}
        status, reply = await self._ask(url, body)
        if status != 200:
            return {"error": reply["error"]["message"]}
        used = reply["usage"]
        if self._kind == "embed":
            return {"embedding": reply["data"][0]["embedding"], "prompt_tokens": used["prompt_tokens"], "error": None}
        choice = reply["choices"][0]
        return {
            "output": choice["text"] if "text" in choice else choice["message"]["content"],
            "finish_reason": choice["finish_reason"],
            "prompt_tokens": used["prompt_tokens"],
            "completion_tokens": used["completion_tokens"],
            "error": None,
        }

    def _request(self, row: Any) -> tuple[str, dict[str, Any]]:
        """Return the URL and the body for a row.  Raises ValueError if it has no text."""
        if not isinstance(row, dict):
            raise ValueError("the row cannot be read")
        column = self._answering.column or next((name for name in TEXT_COLUMNS if name in row), None)
        if column is None or column not in row:
            expected = self._answering.column or " or ".join(TEXT_COLUMNS)
            raise ValueError(f"the row has no {expected}")
        value, model = row[column], self._answering.options.name
        if self._kind == "embed":
            return _URL["embed"], {"model": model, "input": value}
        if isinstance(value, list) or self._kind == "chat":
            turns = value if isinstance(value, list) else [{"role": "user", "content": value}]
            return _URL["chat"], {"model": model, "messages": turns, **self._answering.settings}
        return _URL["generate"], {"model": model, "prompt": value, **self._answering.settings}

    async def _openai(self, row: Any, number: str) -> dict[str, Any]:
        """The line of OpenAI's output file for a line of its input file."""
        line: dict[str, Any] = {"id": f"batch_req_{number}", "custom_id": None, "response": None, "error": None}
        if isinstance(row, dict):
            line["custom_id"] = row.get("custom_id")
        wrong = _not_a_request(row)
        if wrong is not None:
            return {**line, "error": {"code": "invalid_request", "message": wrong}}
        status, reply = await self._ask(row["url"], row["body"])
        return {**line, "response": {"status_code": status, "request_id": number, "body": reply}}

    async def _ask(self, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        async with self._places:
            try:
                answer = await self._client.post(url, json=body)
                return answer.status_code, answer.json()
            except Exception as error:  # of this row, and no reason to end the job
                return 500, {"error": {"message": f"{type(error).__name__}: {error}"}}


def _not_a_request(row: Any) -> str | None:
    """Return why a line is not a request of OpenAI's batch format, or None if it is one."""
    if not isinstance(row, dict):
        return "the line is no JSON object"
    if not isinstance(row.get("custom_id"), str):
        return f"custom_id is {row.get('custom_id')!r}, expected a string"
    if row.get("method", "POST") != "POST":
        return f"method is {row['method']!r}, expected 'POST'"
    if row.get("url") not in _URL.values():
        return f"url is {row.get('url')!r}, expected {' or '.join(_URL.values())}"
    if not isinstance(row.get("body"), dict):
        return "body is no object"
    if row["body"].get("stream"):
        return "stream is set; a batch has whole answers"
    return None
