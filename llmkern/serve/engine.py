"""Engine that connects requests to the model: admission or refusal, streamed tokens, and an end in every case.

Everything here runs in the server's event loop; the worker is the manager's thread, which reports each step by one
`call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from llmkern.serve.manager import Arrived, Manager
from llmkern.serve.metrics import Metrics
from llmkern.serve.options import ServeOptions
from llmkern.serve.sampling import Drawn, History, Sampling
from llmkern.serve.text import Detokenizer, StopStrings
from llmkern.serve.timings import Timings

__all__ = ["Dead", "Engine", "Event", "Failed", "Generation", "Overloaded"]

_WARM_UP_TOKENS = 4
_LONGEST_RETRY = 60  # seconds


class Overloaded(Exception):
    """No place is left; `retry_after` is in whole seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("all places are taken and the queue is full")
        self.retry_after = retry_after


class Dead(Exception):
    """The worker has ended; the server is about to."""


class Failed(Exception):
    """This request's sequence ended with an error; the others go on."""


@dataclass(frozen=True)
class Event:
    """Result of one token for the sequence `index`.  finish: None, "stop" or "length"."""

    index: int
    text: str
    drawn: Drawn
    finish: Literal["stop", "length"] | None


class Generation:
    """The sequences of one request.  Iterate `events`; leaving the block of `async with` ends what still runs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.queue: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self.sequences: list[_Sequence] = []

    @property
    def timings(self) -> list[Timings]:
        """Timings, one per sequence."""
        return [sequence.timings for sequence in self.sequences]

    async def events(self) -> AsyncIterator[Event]:
        """Yield events of all sequences, as they come, until each has finished.  Raises Failed or Dead."""
        left = len(self.sequences)
        while left:
            event = await self.queue.get()
            if isinstance(event, Exception):
                raise event
            left -= event.finish is not None
            yield event

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(self, *_: object) -> None:
        for sequence in self.sequences:
            self._engine.end(sequence, "abort", cancel=True)


@dataclass(frozen=True)
class _Sequence:
    """One of a request's answers, on its way from tokens to text."""

    identity: str
    index: int
    max_tokens: int
    timings: Timings
    detokenizer: Detokenizer
    stops: StopStrings
    owner: Generation


class Engine:
    """A model that generates, and the worker that runs it.  `start` and `stop` are called in the event loop."""

    def __init__(self, model: nn.Module, tokenizer: Any, options: ServeOptions) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.metrics = self._new_metrics()
        self.died: asyncio.Event = asyncio.Event()
        self.eos = _eos(model, tokenizer)
        self._sequences: dict[str, _Sequence] = {}
        self._identities = itertools.count()
        self._mean_seconds = 1.0  # of recent sequences
        self._device: torch.device = model.device  # type: ignore[assignment]
        self.manager = Manager(model, options, self._from_worker, self._death_in_worker)

    def _new_metrics(self) -> Metrics:
        metrics = Metrics(self.options.name)
        metrics.gauge("num_requests_running", "Sequences that are generated.", lambda: self.running)
        metrics.gauge("num_requests_waiting", "Sequences in the queue.", lambda: self.waiting)
        metrics.gauge("kv_cache_usage_perc", "Used share of the cache, 0 to 1.", lambda: self.manager.cache_used)
        looked_up, found = "Tokens of prompts looked up in the cache.", "Tokens of prompts found in the cache."
        metrics.total("prefix_cache_queries", looked_up, lambda: self.manager.prefix_queries)
        metrics.total("prefix_cache_hits", found, lambda: self.manager.prefix_hits)
        return metrics

    @property
    def running(self) -> int:
        return min(len(self._sequences), self.options.max_concurrent)

    @property
    def waiting(self) -> int:
        return len(self._sequences) - self.running

    @property
    def dead(self) -> bool:
        return self.died.is_set()

    async def start(self) -> None:
        """Start the worker and generate a few tokens, so that the first request does not wait for warm-up.

        Raises Failed where the model cannot be run.
        """
        self._loop = asyncio.get_running_loop()
        self.manager.start()
        prompt = [self.eos[0] if self.eos else 0] * 2
        async with self.submit([(prompt, _WARM_UP_TOKENS)], 1, Sampling(temperature=0.0), ()) as warm_up:
            async for _ in warm_up.events():
                pass
        self.metrics = self._new_metrics()  # without the warm-up

    async def stop(self) -> None:
        """End the worker, whose thread would keep the process alive; what still runs gets an error."""
        if self.manager.is_running():
            await asyncio.to_thread(self.manager.stop, hard_stop=True)
        self._fail_all(Dead("the server is shutting down"))

    def submit(
        self, prompts: list[tuple[list[int], int]], n: int, sampling: Sampling, stops: Sequence[str]
    ) -> Generation:
        """Queue n sequences for each prompt and its answer's longest length.

        They are numbered prompt by prompt; a seed counts up within a prompt.  Raises Overloaded or Dead, with nothing
        queued.
        """
        if self.dead:
            raise Dead("the worker has ended")
        if len(self._sequences) + n * len(prompts) > self.options.max_concurrent + self.options.max_queue:
            self.metrics.rejected()
            seconds = self._mean_seconds * max(self.waiting, 1) / self.options.max_concurrent
            raise Overloaded(min(max(math.ceil(seconds), 1), _LONGEST_RETRY))
        generation = Generation(self)
        for prompt, max_tokens in prompts:
            for i in range(n):
                own = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + i)
                self._queue_one(generation, prompt, max_tokens, own, stops)
        return generation

    def _queue_one(
        self, generation: Generation, prompt: list[int], max_tokens: int, sampling: Sampling, stops: Sequence[str]
    ) -> None:
        sequence = _Sequence(
            identity=f"s{next(self._identities)}",
            index=len(generation.sequences),
            max_tokens=max_tokens,
            timings=Timings(time.perf_counter(), len(prompt)),
            detokenizer=Detokenizer(self.tokenizer),
            stops=StopStrings(stops),
            owner=generation,
        )
        self._sequences[sequence.identity] = sequence
        generation.sequences.append(sequence)
        history = History(prompt, sampling, self._device)
        try:
            self.manager.submit(sequence.identity, prompt, max_tokens, self.eos, history)
        except Exception as error:
            for queued in generation.sequences:
                self.end(queued, "error", cancel=True)
            raise Dead(str(error)) from error

    def end(self, sequence: _Sequence, reason: str, *, cancel: bool) -> None:
        """Release a sequence's place; does nothing if it has ended already."""
        if self._sequences.pop(sequence.identity, None) is None:
            return
        self.manager.forget(sequence.identity, cancel=cancel)
        self.metrics.finished(reason, sequence.timings)
        if sequence.timings.started is not None and sequence.timings.last is not None:
            self._mean_seconds += 0.1 * (sequence.timings.last - sequence.timings.started - self._mean_seconds)

    def _from_worker(self, arrived: list[Arrived]) -> None:
        self._loop.call_soon_threadsafe(self._deliver, arrived)

    def _death_in_worker(self, error: Exception) -> None:
        self._loop.call_soon_threadsafe(self._die, error)

    def _deliver(self, arrived: list[Arrived]) -> None:
        self.metrics.step(len(arrived))
        for one in arrived:
            sequence = self._sequences.get(one.identity)
            if sequence is None:  # cancelled meanwhile
                continue
            if isinstance(one.outcome, Exception):
                self.end(sequence, "error", cancel=False)
                sequence.owner.queue.put_nowait(Failed(f"{type(one.outcome).__name__}: {one.outcome}"))
                continue
            try:
                self._token(sequence, one.outcome, one.started, one.at)
            except Exception as error:
                self.end(sequence, "error", cancel=True)
                sequence.owner.queue.put_nowait(Failed(f"{type(error).__name__}: {error}"))

    def _token(self, sequence: _Sequence, drawn: Drawn, started: float, at: float) -> None:
        self.metrics.token(sequence.timings.note(started, at))
        is_eos = drawn.token in self.eos
        is_last = is_eos or sequence.timings.tokens >= sequence.max_tokens
        text, stopped = sequence.stops.push("" if is_eos else sequence.detokenizer.push(drawn.token))
        if is_last and not stopped:
            rest, stopped = sequence.stops.push(sequence.detokenizer.finish())
            text += rest + ("" if stopped else sequence.stops.finish())
        finish: Literal["stop", "length"] | None = "stop" if is_eos or stopped else "length" if is_last else None
        if finish is not None:
            self.end(sequence, finish, cancel=not is_last)
        sequence.owner.queue.put_nowait(Event(sequence.index, text, drawn, finish))

    def _die(self, error: Exception) -> None:
        self.died.set()
        self._fail_all(Dead(f"the worker has ended: {type(error).__name__}: {error}"))

    def _fail_all(self, error: Exception) -> None:
        for sequence in list(self._sequences.values()):
            self.end(sequence, "error", cancel=False)
            sequence.owner.queue.put_nowait(error)


def _eos(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: those of the generation config, else the tokenizer's."""
    named = model.generation_config.eos_token_id
    if named is None:
        named = tokenizer.eos_token_id
    return [] if named is None else [named] if isinstance(named, int) else list(named)
