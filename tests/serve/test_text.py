"""Tokens to text as they come, and stop strings."""

from __future__ import annotations

import random
from typing import Any

import pytest

from llmkern.serve.text import Detokenizer, StopStrings

TEXT = "naïve 日本語 🙂🙂 — and plain text"


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    growing = Detokenizer(tokenizer)
    return [*[growing.push(token) for token in ids], growing.finish()]


def test_pieces_are_the_text_and_no_character_is_cut(tokenizer: Any) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    found = pieces(tokenizer, ids)
    assert "".join(found) == TEXT
    assert len(ids) > len(TEXT)
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in found)


def test_an_unfinished_character_comes_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer("a🙂")["input_ids"][:-1]
    assert pieces(tokenizer, ids)[-1] == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_no_text(tokenizer: Any) -> None:
    assert "".join(pieces(tokenizer, [*tokenizer("ab")["input_ids"], tokenizer.eos_token_id])) == "ab"


@pytest.mark.parametrize("seed", range(5))
def test_a_stop_string_ends_the_text_wherever_it_is_cut(seed: int) -> None:
    dice = random.Random(seed)
    text, stops = "one STOP two END three", ("END", "STOP", "STOPPER")
    matcher, shown, stopped = StopStrings(stops), "", False
    while text and not stopped:
        size = dice.randint(1, 4)
        piece, stopped = matcher.push(text[:size])
        shown, text = shown + piece, text[size:]
    assert stopped
    assert shown == "one "


def test_what_only_began_like_a_stop_string_is_shown() -> None:
    matcher = StopStrings(("STOP",))
    assert matcher.push("a ST") == ("a ", False)
    assert matcher.push("and S") == ("STand ", False)
    assert matcher.finish() == "S"
    assert StopStrings(()).push("all of it") == ("all of it", False)
