"""Timestamps of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Timings"]


@dataclass
class Timings:
    """Seconds of time.perf_counter(): arrival, the first step, the first and the last token; None where not reached."""

    arrived: float
    prompt_tokens: int
    tokens: int = 0
    started: float | None = None
    first: float | None = None
    last: float | None = None

    def note(self, started: float, at: float) -> float | None:
        """Record a token; return the seconds since the last one, None for the first."""
        before, self.last = self.last, at
        self.tokens += 1
        if before is None:
            self.started, self.first = started, at
            return None
        return at - before

    def to_dict(self) -> dict[str, float | int | None]:
        """Return a dict for an answer: llama.cpp's names for prompt and prediction, vLLM's for the rest."""
        if self.first is None or self.last is None or self.started is None:
            return {"prompt_n": self.prompt_tokens, "predicted_n": self.tokens}
        prompt, decode = self.first - self.started, self.last - self.first
        per_second = (self.tokens - 1) / decode if decode > 0 else None
        return {
            "queue_time_ms": 1e3 * (self.started - self.arrived),
            "time_to_first_token_ms": 1e3 * (self.first - self.arrived),
            "prompt_n": self.prompt_tokens,
            "prompt_ms": 1e3 * prompt,
            "prompt_per_second": self.prompt_tokens / prompt if prompt > 0 else None,
            "predicted_n": self.tokens,
            "predicted_ms": 1e3 * decode,
            "predicted_per_second": per_second,
            "mean_itl_ms": 1e3 * decode / (self.tokens - 1) if self.tokens > 1 else None,
        }
