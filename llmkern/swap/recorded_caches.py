"""Caches of a layer while its program is read: they hold a few tokens, report many, and record what joins them."""

from __future__ import annotations

import types
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from llmkern.swap.observe import aside
from llmkern.swap.record import Recorder

__all__ = ["FAR_POSITION", "Caches"]

FAR_POSITION = 10**6


class Past:
    """One-layer cache that holds some keys and values [B, Hkv, n, D] and reports 10⁶ tokens seen.

    op: "append", or "keep" for the cache of an encoder's tokens, which is empty."""

    def __init__(self, recorder: Recorder, tokens: int, op: str) -> None:
        self.recorder, self.tokens, self.op = recorder, tokens, op
        self.states: tuple[Tensor, ...] | None = None
        self.layers: Any = ()

    def get_seq_length(self, *_: Any) -> int:
        return FAR_POSITION

    def update(self, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return aside(self._update)(k, v)

    def _update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = self.joined(k, v)
        self.recorder.append(self.op, k, v, *out)
        return out

    def joined(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return all keys and values; the cache itself does not change."""
        if self.states is None:
            generator = torch.Generator().manual_seed(1)
            shapes = [(*x.shape[:2], self.tokens, x.shape[3]) for x in (k, v)]
            self.states = tuple([torch.randn(shape, generator=generator).to(k.dtype) for shape in shapes])
        return torch.cat((self.states[0], k), 2), torch.cat((self.states[1], v), 2)


class _Always(dict[Any, bool]):
    """Flags of a filled cache: `get` returns True for every layer."""

    def get(self, *_: Any) -> bool:
        return True


class Caches:
    """Caches of a layer's own tokens and of an encoder's tokens; implements `Cache` of llmkern/programs/run.py."""

    def __init__(self, recorder: Recorder, tokens: int) -> None:
        self.own, self.encoder = Past(recorder, tokens, "append"), Past(recorder, 0, "keep")

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.own.joined(k, v)

    def keep(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder.joined(k, v)

    def for_both(self, kept: tuple[Tensor, Tensor] | None) -> Any:
        """Return a transformers.EncoderDecoderCache of the two.  kept: contents of the encoder's cache, None if it is
        empty.
        """
        from transformers import EncoderDecoderCache

        both: Any = object.__new__(EncoderDecoderCache)
        vars(both).update(self_attention_cache=self.own, cross_attention_cache=self.encoder, is_updated={})
        if kept is not None:
            every: dict[Any, Any] = defaultdict(lambda: types.SimpleNamespace(keys=kept[0], values=kept[1]))
            both.is_updated, self.encoder.layers = _Always(), every
        return both
