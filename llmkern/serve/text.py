"""Decode tokens to text as they come, and cut it at stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["Detokenizer", "StopStrings"]

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of a growing sequence of tokens, without special tokens.

    A token's text depends on the tokens before it (spaces, characters spread over tokens), so each step decodes a
    short window twice, without and with the new token; the difference is new (as vLLM and text-generation-inference).
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._begin = self._read = 0

    def push(self, token: int) -> str:
        """Add a token and return the text that it completes; empty inside a character."""
        self._tokens.append(token)
        new = self._new()
        if not new or new.endswith(_INCOMPLETE):
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        return new

    def finish(self) -> str:
        """Return the rest, with U+FFFD for the bytes of an incomplete character."""
        return self._new()

    def _new(self) -> str:
        known = self._decode(self._tokens[self._begin : self._read])
        return self._decode(self._tokens[self._begin :])[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopStrings:
    """Holds text back while it may be the beginning of a stop string, and ends it before the first one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; return what may be shown, and whether a stop string has come.  Nothing is pushed after that."""
        self._held += text
        found = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if found:
            return self._held[: min(found)], True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown, False

    def finish(self) -> str:
        """Return text that was held back but was not a stop string."""
        return self._held

    def _overlap(self, stop: str) -> int:
        """Return how many characters at the end of the held text begin `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)
