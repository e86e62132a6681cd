"""Compute embeddings with an encoder: waiting texts of all requests share one padded forward."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.serve.engine import Dead, Failed, Overloaded
from llmkern.serve.metrics import Metrics
from llmkern.serve.options import ServeOptions
from llmkern.serve.timings import Timings

__all__ = ["EmbeddingEngine"]


class EmbeddingEngine:
    """An encoder, its queue of texts and one worker thread.  `start` and `stop` are called in the event loop.

    An embedding is the mean of the last hidden states of the text's tokens, scaled to length 1: what the models of
    sentence-transformers with mean pooling give, all-MiniLM-L6-v2 among them.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, options: ServeOptions) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.metrics = Metrics(options.name)
        self.died: asyncio.Event = asyncio.Event()
        self._queue: deque[tuple[list[int], Timings, asyncio.Future[list[float]]]] = deque()
        self._more: asyncio.Event = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._task: asyncio.Task[None] | None = None
        self.running = 0
        self.metrics.gauge("num_requests_running", "Texts in the forward that runs.", lambda: self.running)
        self.metrics.gauge("num_requests_waiting", "Texts in the queue.", lambda: self.waiting)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def dead(self) -> bool:
        return self.died.is_set()

    async def start(self) -> None:
        """Start the worker.  Raises Failed where the model cannot be run."""
        self._task = asyncio.create_task(self._work())
        self._task.add_done_callback(lambda task: self.died.set())
        await self.embed([[0, 0]])

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()

    async def embed(self, texts: list[list[int]]) -> list[list[float]]:
        """Return one embedding for each text's tokens.  Raises Overloaded, Failed or Dead; cancelling drops the
        texts.
        """
        if self.dead:
            raise Dead("the worker has ended")
        # One request may have more texts than there are places; it then waits for an empty queue.
        if self._queue and len(self._queue) + len(texts) > self.options.max_queue:
            self.metrics.rejected()
            raise Overloaded(1)
        futures = []
        for tokens in texts:
            future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
            self._queue.append((tokens, Timings(time.perf_counter(), len(tokens)), future))
            futures.append(future)
        self._more.set()
        return list(await asyncio.gather(*futures))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._more.wait()
            self._more.clear()
            while self._queue:
                taken = [self._queue.popleft() for _ in range(min(self.options.max_concurrent, len(self._queue)))]
                taken = [one for one in taken if not one[2].done()]
                if not taken:
                    continue
                self.running, started = len(taken), time.perf_counter()
                try:
                    found = await loop.run_in_executor(self._thread, self._forward_or_each, [one[0] for one in taken])
                finally:
                    self.running = 0
                for (_, timings, future), outcome in zip(taken, found, strict=True):
                    self._deliver(future, timings, started, outcome)

    def _deliver(
        self, future: asyncio.Future[list[float]], timings: Timings, started: float, outcome: list[float] | Exception
    ) -> None:
        timings.note(started, time.perf_counter())
        failed = isinstance(outcome, Exception)
        self.metrics.finished("error" if failed else "abort" if future.done() else "stop", timings)
        with contextlib.suppress(asyncio.InvalidStateError):  # the client has gone
            if isinstance(outcome, Exception):
                future.set_exception(Failed(f"{type(outcome).__name__}: {outcome}"))
            else:
                future.set_result(outcome)

    def _forward_or_each(self, texts: list[list[int]]) -> list[list[float] | Exception]:
        """Run all texts at once; if that fails, run them one by one, so that only those at fault fail."""
        try:
            return list(self._forward(texts))
        except Exception as error:
            if len(texts) == 1:
                return [error]
        return [one for text in texts for one in self._forward_or_each([text])]

    @torch.inference_mode()
    def _forward(self, texts: list[list[int]]) -> list[list[float]]:
        device: torch.device = self.model.device  # type: ignore[assignment]
        longest = max(len(text) for text in texts)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([text + [pad] * (longest - len(text)) for text in texts], device=device)
        lengths = torch.tensor([len(text) for text in texts], device=device)
        mask: Tensor = (torch.arange(longest, device=device) < lengths[:, None]).long()
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        means = (hidden * mask[..., None]).sum(1) / lengths[:, None]
        embeddings: list[list[float]] = torch.nn.functional.normalize(means, dim=-1).tolist()
        return embeddings
