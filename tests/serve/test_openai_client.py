"""The server asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from tiny_server import Served

QUESTION: list[Any] = [{"role": "user", "content": "hello"}]
LONG: list[Any] = [{"role": "user", "content": "a prompt of more than one page, " * 10}]


def ids_of(tokenizer: Any, messages: list[Any]) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def expected(tokenizer: Any, one_by_one: Callable[..., list[int]], messages: list[Any], tokens: int) -> str:
    text: str = tokenizer.decode(one_by_one(ids_of(tokenizer, messages), tokens))
    return text


@pytest.mark.parametrize("messages", [QUESTION, LONG], ids=["short", "long"])
def test_a_chat_is_what_generate_gives(
    client: OpenAI, tokenizer: Any, one_by_one: Callable[..., list[int]], messages: list[Any]
) -> None:
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=24, temperature=0)
    assert answer.choices[0].message.content == expected(tokenizer, one_by_one, messages, 24)
    assert answer.choices[0].finish_reason == "length"
    prompt = len(ids_of(tokenizer, messages))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 24)
    timings = answer.model_extra["timings"]
    assert (timings["prompt_n"], timings["predicted_n"]) == (prompt, 24)
    assert timings["predicted_per_second"] > 0
    assert 0 <= timings["queue_time_ms"] <= timings["time_to_first_token_ms"]


def test_a_stream_is_the_same_text_and_ends_with_the_usage(
    client: OpenAI, tokenizer: Any, one_by_one: Callable[..., list[int]]
) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected(tokenizer, one_by_one, QUESTION, 24)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 24 + ["length"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1


def test_many_at_once_are_what_each_is_alone(
    served: Served, tokenizer: Any, one_by_one: Callable[..., list[int]]
) -> None:
    questions: list[list[Any]] = [[{"role": "user", "content": f"{i} " * (1 + 11 * (i % 6))}] for i in range(12)]

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:

            async def ask(question: list[Any]) -> str:
                stream = await client.chat.completions.create(
                    model="tiny", messages=question, max_tokens=20, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(ask, questions))

    assert asyncio.run(ask_all()) == [expected(tokenizer, one_by_one, question, 20) for question in questions]
    served.wait_idle()


def test_a_seed_repeats_alone_and_in_a_crowd(served: Served) -> None:
    async def ask(client: AsyncOpenAI, seed: int | None) -> str:
        answer = await client.chat.completions.create(
            model="tiny", messages=QUESTION, max_tokens=16, temperature=1.0, top_p=0.9, seed=seed
        )
        return answer.choices[0].message.content or ""

    async def both() -> tuple[str, list[str]]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
            alone = await ask(client, 5)
            return alone, await asyncio.gather(*[ask(client, seed) for seed in (5, None, 6, None)])

    alone, crowd = asyncio.run(both())
    assert crowd[0] == alone
    assert len(set(crowd)) == 4


def test_stop_strings_cut_and_free(client: OpenAI, tokenizer: Any, one_by_one: Callable[..., list[int]]) -> None:
    whole = expected(tokenizer, one_by_one, QUESTION, 24)
    stop = next(whole[i : i + 2] for i in range(4, 20) if "\N{REPLACEMENT CHARACTER}" not in whole[i : i + 2])
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=24, temperature=0, stop=[stop, "never there"]
    )
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_the_end_token_stops(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=24, temperature=0, logit_bias={"256": 100}
    )
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1


def test_n_answers_differ_and_share_one_prompt(client: OpenAI) -> None:
    def ask() -> Any:
        return client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=16, seed=1, n=3)

    answer = ask()
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (22, 48)
    assert [choice.message.content for choice in ask().choices] == texts


def test_logprobs_are_reported(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 4
    for entry in logprobs.content:
        assert entry.logprob == entry.top_logprobs[0].logprob > entry.top_logprobs[1].logprob


def test_a_penalty_ends_repetition(client: OpenAI) -> None:
    def ask(**options: Any) -> str:
        answer = client.completions.create(
            model="tiny", prompt="x", max_tokens=12, temperature=0, logit_bias={"65": 50}, **options
        )
        return answer.choices[0].text

    repeated = ask()
    assert len(set(repeated)) == 1
    assert len(repeated) == 12
    # Each time the token comes it loses 2 + 2, at last all of its 50.
    assert len(set(ask(frequency_penalty=2.0, presence_penalty=2.0, extra_body={"repetition_penalty": 2.0}))) > 1


def test_completions_of_several_prompts(client: OpenAI, tokenizer: Any, one_by_one: Callable[..., list[int]]) -> None:
    answer = client.completions.create(model="tiny", prompt=["ab", "cde"], max_tokens=8, temperature=0, logprobs=1)
    want = [tokenizer.decode(one_by_one(tokenizer(text)["input_ids"], 8)) for text in ("ab", "cde")]
    assert [choice.text for choice in answer.choices] == want
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 16)
    as_tokens = client.completions.create(
        model="tiny", prompt=tokenizer("ab")["input_ids"], max_tokens=8, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in as_tokens) == want[0]


def test_a_cancelled_stream_frees_its_place_within_a_step(served: Served) -> None:
    client = served.client()
    stream = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=450, stream=True)
    next(iter(stream))
    stream.close()
    served.wait_idle()
    with served.client() as other:
        text = other.with_raw_response.models.list()  # the server still answers
    assert text.status_code == 200
    assert "abort" in served.engine.metrics.text().decode()


def test_a_cancelled_answer_frees_its_place(served: Served) -> None:
    before = served.engine.manager.steps

    async def give_up() -> None:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
            ask = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=450, temperature=0)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(ask, 0.1)

    asyncio.run(give_up())
    served.wait_idle()
    steps = served.engine.manager.steps
    assert steps - before < 450
    time.sleep(0.1)
    assert served.engine.manager.steps == steps


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "llmkern"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=QUESTION)
