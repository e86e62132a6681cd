"""Embeddings: what the encoder gives alone, by OpenAI's client, whatever texts are beside."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from openai import AsyncOpenAI
from tiny_server import CONTEXT, Served, get, post, serving, tiny_model

import llmkern

TEXTS = ["a", "two words", "a longer text than the others are", "é"]


def tiny_encoder() -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertModel(BertConfig(vocab_size=258, max_position_embeddings=CONTEXT, **sizes)).eval()


def embedding(ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        hidden = tiny_encoder()(torch.tensor([ids])).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden.mean(0), dim=-1)


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> Iterator[Served]:
    with serving(llmkern.optimize_(tiny_encoder()), tokenizer, max_concurrent=4, max_queue=8) as server:
        yield server


@pytest.mark.parametrize("form", [{}, {"encoding_format": "float"}], ids=["base64", "float"])
def test_embeddings_are_the_models(encoder: Served, tokenizer: Any, form: dict[str, Any]) -> None:
    with encoder.client() as client:
        answer = client.embeddings.create(model="tiny", input=TEXTS, **form)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    for one, tokens in zip(answer.data, ids, strict=True):
        torch.testing.assert_close(torch.tensor(one.embedding), embedding(tokens), rtol=1e-4, atol=1e-5)
    assert [one.index for one in answer.data] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == sum(map(len, ids))


def test_many_at_once(encoder: Served, tokenizer: Any) -> None:
    async def ask_all() -> list[list[float]]:
        async with AsyncOpenAI(base_url=f"{encoder.url}/v1", api_key="any", max_retries=0) as client:
            found = await asyncio.gather(*[client.embeddings.create(model="tiny", input=text) for text in TEXTS])
        return [one.data[0].embedding for one in found]

    for found, text in zip(asyncio.run(ask_all()), TEXTS, strict=True):
        want = embedding(tokenizer(text)["input_ids"])
        torch.testing.assert_close(torch.tensor(found), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "status", "field"),
    [
        ({"input": ""}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": "x" * 600}, 400, "input"),
        ({"input": [[300]]}, 400, "input"),
        ({"dimensions": 8}, 400, "dimensions"),
        ({"model": "another"}, 404, "model"),
    ],
    ids=str,
)
def test_what_is_not_served(encoder: Served, change: dict[str, Any], status: int, field: str) -> None:
    answer = post(f"{encoder.url}/v1/embeddings", json={"model": "tiny", "input": "x"} | change)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, field)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    assert post(f"{encoder.url}/v1/chat/completions", json=chat).status_code == 404


def test_a_text_that_fails_leaves_the_others(tokenizer: Any) -> None:
    model = tiny_encoder()

    def refuse(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if (args[0] == 7).any():
            raise RuntimeError("no such embedding")

    with serving(model, tokenizer) as served:
        model.embeddings.word_embeddings.register_forward_pre_hook(refuse)

        async def both() -> list[int]:
            async with httpx.AsyncClient(base_url=served.url) as client:
                bodies: list[Any] = [{"model": "tiny", "input": ids} for ids in ([1, 2], [7], [3])]
                return [
                    a.status_code
                    for a in await asyncio.gather(*[client.post("/v1/embeddings", json=b) for b in bodies])
                ]

        assert asyncio.run(both()) == [200, 500, 200]
        assert get(served.url + "/health").status_code == 200


def test_a_language_model_has_none(served: Served) -> None:
    assert tiny_model().can_generate()
    assert post(f"{served.url}/v1/embeddings", json={"model": "tiny", "input": "x"}).status_code == 404
