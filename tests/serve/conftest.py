"""The tiny server that most tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("openai", reason="the extra serve is not installed")

from openai import OpenAI
from tiny_server import Served, serving, tiny_model, tiny_tokenizer

import llmkern


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def served(tokenizer: Any) -> Iterator[Served]:
    """An optimized model, 4 at a time."""
    model = tiny_model()
    llmkern.optimize_(model)
    with serving(model, tokenizer, max_concurrent=4, max_queue=60) as server:
        yield server


@pytest.fixture
def client(served: Served) -> OpenAI:
    return served.client()


@pytest.fixture(scope="session")
def one_by_one(served: Served, tokenizer: Any) -> Callable[..., list[int]]:
    """What `generate` of an untouched twin gives, token by token."""
    twin = tiny_model()

    def generate(ids: list[int], tokens: int) -> list[int]:
        with torch.no_grad():
            out = twin.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=257)
        return out[0, len(ids) :].tolist()

    return generate
