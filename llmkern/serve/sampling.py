"""Sample the next token of each sequence of a step, with its own settings and random numbers.

transformers' manager samples all requests alike (one `do_sample`, one generator); a server's requests differ, and a
seeded one must get the same tokens whoever shares its batch.  So each sequence is sampled by itself from its row of
logits, with a generator of its own; rows that ask for the largest logit only are one argmax.

Order, as in vLLM: logit_bias, repetition penalty (Keskar et al. 2019), frequency and presence penalties (OpenAI's
formula), then the largest logit at temperature 0, else temperature, top-k, top-p (Holtzman et al. 2020).
Log-probabilities are those of the model, before any of this.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Drawn", "History", "Sampling", "draw"]

_HEAD = 1024  # a nucleus rarely has more tokens than this; then the whole vocabulary is sorted


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one sequence.  top_k 0: all tokens.  logprobs: alternatives to report, None for no
    report.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    @property
    def plain(self) -> bool:
        """True if the token is simply the largest logit and nothing else is reported."""
        changed = self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0 or self.logit_bias
        return self.temperature == 0.0 and not changed and self.logprobs is None


@dataclass(frozen=True)
class Drawn:
    """A token, its log-probability, and the most likely tokens with theirs, where they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class History:
    """Sampling state of a sequence: its prompt, generated tokens, and random numbers."""

    def __init__(self, prompt: list[int], sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.counts: dict[int, int] = {}
        self._prompt = torch.tensor(sorted(set(prompt)), device=device) if sampling.repetition_penalty != 1.0 else None
        self.generator = torch.Generator(device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def add(self, token: int) -> None:
        """Note a generated token."""
        self.counts[token] = self.counts.get(token, 0) + 1

    def penalise(self, logits: Tensor) -> Tensor:
        """Return logits [V] with bias and penalties applied; a new tensor if there are any."""
        s = self.sampling
        if s.logit_bias:
            logits = logits.clone()
            logits[list(s.logit_bias)] += torch.tensor(list(s.logit_bias.values()), device=logits.device)
        if self._prompt is not None:
            seen = torch.cat([self._prompt, self._prompt.new_tensor(list(self.counts))]).unique()
            there = logits[seen]
            logits = logits.clone()
            logits[seen] = torch.where(there > 0, there / s.repetition_penalty, there * s.repetition_penalty)
        if self.counts and (s.frequency_penalty or s.presence_penalty):
            tokens = torch.tensor(list(self.counts), device=logits.device)
            counts = torch.tensor(list(self.counts.values()), device=logits.device, dtype=logits.dtype)
            logits = logits.clone()
            logits[tokens] -= s.frequency_penalty * counts + s.presence_penalty
        return logits


def draw(logits: Tensor, histories: list[History]) -> list[Drawn | Exception]:
    """The next token of each sequence from its row of fp32 logits [B, V]; an exception in its place where it failed."""
    drawn: list[Drawn | Exception] = []
    largest = logits.argmax(-1).tolist()
    for row, token, history in zip(logits, largest, histories, strict=True):
        try:
            drawn.append(Drawn(token) if history.sampling.plain else _draw_one(row, history))
        except Exception as error:  # of this sequence, and no reason to end the others
            drawn.append(error)
    return drawn


def _draw_one(logits: Tensor, history: History) -> Drawn:
    sampling = history.sampling
    scores = history.penalise(logits)
    token = int(scores.argmax()) if sampling.temperature == 0.0 else _random(scores, sampling, history.generator)
    if sampling.logprobs is None:
        return Drawn(token)
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(sampling.logprobs)
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return Drawn(token, float(logprobs[token]), top)


def _random(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    scores = scores / sampling.temperature
    kept: Tensor | None = None  # tokens that remain, most likely first
    if 0 < sampling.top_k < scores.numel():
        scores, kept = scores.topk(sampling.top_k)
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1.0:
        if kept is None:
            probabilities, kept = _most_likely(probabilities, sampling.top_p)
        # The tokens before which less than top_p has been reached, so that there is always one.
        probabilities = probabilities * (probabilities.cumsum(-1) - probabilities < sampling.top_p)
    chosen = int(torch.multinomial(probabilities, 1, generator=generator))
    return chosen if kept is None else int(kept[chosen])


def _most_likely(probabilities: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """The most likely tokens' probabilities and ids, in order, with at least this mass together."""
    if probabilities.numel() > _HEAD:
        head, tokens = probabilities.topk(_HEAD)
        if float(head.sum()) >= mass:
            return head, tokens
    ordered: tuple[Tensor, Tensor] = probabilities.sort(descending=True)
    return ordered
