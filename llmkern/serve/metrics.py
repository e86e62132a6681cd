"""Prometheus metrics under the names that vLLM's dashboards ask for, with `llmkern:` in front."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llmkern.serve.timings import Timings

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_WINDOW = 5.0  # seconds over which tokens are counted for their speed
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """One server's metrics; `model_name` is a label of each."""

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        self._model = model
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._tokens = self._counter("generation_tokens", "Generated tokens.")
        self._rejected = self._counter("request_rejected", "Requests answered with status 429.")
        self._success = Counter(
            "llmkern:request_success", "Finished sequences.", ("model_name", "finished_reason"), registry=self._registry
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self._itl = self._histogram("inter_token_latency_seconds", "Between two tokens of a sequence.")
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first step.")
        self._prefill = self._histogram("request_prefill_time_seconds", "From the first step to the first token.")
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the last.")
        self._step = self._histogram("iteration_tokens_total", "Sequences that a step gave a token.", _TOKENS)
        self._steps: deque[tuple[float, int]] = deque()
        process = psutil.Process()
        process.cpu_percent()  # of the time since the last call
        self.gauge("generation_tokens_per_second", f"Of the last {_WINDOW:g} seconds.", self._tokens_per_second)
        self.gauge(
            "process_cpu_percent", "100 for each core that is busy, since the last reading.", process.cpu_percent
        )
        self.gauge("process_resident_memory_bytes", "Memory of this process.", lambda: process.memory_info().rss)

    def gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is computed when it is read."""
        Gauge(f"llmkern:{name}", what, ("model_name",), registry=self._registry).labels(self._model).set_function(value)

    def total(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Add a total that is counted elsewhere."""
        counter = Counter(f"llmkern:{name}", what, ("model_name",), registry=self._registry).labels(self._model)
        counter._value.get = value  # Counter has no set_function of its own

    def step(self, tokens: int) -> None:
        self._step.observe(tokens)
        self._steps.append((time.monotonic(), tokens))
        self._tokens_per_second()  # drops what is old

    def _tokens_per_second(self) -> float:
        while self._steps and self._steps[0][0] < time.monotonic() - _WINDOW:
            self._steps.popleft()
        return sum(tokens for _, tokens in self._steps) / _WINDOW

    def token(self, since_last: float | None) -> None:
        """since_last: seconds since the sequence's last token, None for its first."""
        self._tokens.inc()
        if since_last is not None:
            self._itl.observe(since_last)

    def rejected(self) -> None:
        self._rejected.inc()

    def finished(self, reason: str, timings: Timings) -> None:
        """reason: stop, length, abort or error; times of what a sequence has reached."""
        self._success.labels(self._model, reason).inc()
        self._prompt_tokens.inc(timings.prompt_tokens)
        if timings.first is not None and timings.started is not None and timings.last is not None:
            self._queue.observe(timings.started - timings.arrived)
            self._prefill.observe(timings.first - timings.started)
            self._ttft.observe(timings.first - timings.arrived)
            self._decode.observe(timings.last - timings.first)
            self._e2e.observe(timings.last - timings.arrived)

    def text(self) -> bytes:
        """Return the text that `/metrics` answers."""
        return generate_latest(self._registry)

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(f"llmkern:{name}", what, ("model_name",), registry=self._registry).labels(self._model)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        made = Histogram(f"llmkern:{name}", what, ("model_name",), registry=self._registry, buckets=buckets)
        return made.labels(self._model)
