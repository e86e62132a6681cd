"""What answers a batch job's rows, without Ray around it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_server import CONTEXT, tiny_model, tiny_tokenizer

from llmkern.integrations.ray.files import slices
from llmkern.integrations.ray.worker import Answering, Worker
from llmkern.serve.options import ServeOptions

OPTIONS = ServeOptions("tiny", CONTEXT, max_concurrent=4)
GREEDY = {"max_tokens": 8, "temperature": 0}


def generator() -> tuple[Any, Any]:
    return tiny_model(), tiny_tokenizer()


def plain() -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tiny_model(), tokenizer


def encoder() -> tuple[Any, Any]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=258, max_position_embeddings=CONTEXT, **sizes)
    return BertModel(config).eval(), tiny_tokenizer()


def answers(worker: Worker, path: Path, rows: list[Any]) -> list[dict[str, Any]]:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    (piece,) = slices([path], 100)
    return worker.answer(piece)


@pytest.fixture(scope="module")
def chatting() -> Iterator[Worker]:
    worker = Worker(Answering(generator, OPTIONS, settings=GREEDY))
    yield worker
    worker.close()


def test_a_row_gets_what_generate_gives(tmp_path: Path) -> None:
    worker = Worker(Answering(plain, OPTIONS, settings=GREEDY))
    try:
        rows = [{"prompt": f"text {i} " * (i + 1)} for i in range(10)]
        found = answers(worker, tmp_path / "in.jsonl", rows)
    finally:
        worker.close()
    model, tokenizer = plain()
    for row, answer in zip(rows, found, strict=True):
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=257)[0, ids.shape[1] :]
        assert answer["output"] == tokenizer.decode(out, skip_special_tokens=True)
        assert (answer["prompt_tokens"], answer["completion_tokens"]) == (ids.shape[1], 8)
        assert (answer["finish_reason"], answer["error"]) == ("length", None)


def test_a_bad_row_is_a_row_with_its_error(chatting: Worker, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hello"}]
    rows = [
        {"prompt": "hello"},
        {"messages": turns},
        "{no json",
        {"other": "hello"},
        {"prompt": None},
        {"prompt": "x" * 2 * CONTEXT},
        {"prompt": [{"role": "nobody", "content": "hello"}]},
    ]
    found = answers(chatting, tmp_path / "in.jsonl", rows)
    assert found[0] == found[1]
    assert found[0]["error"] is None
    sentences = [answer["error"] for answer in found[2:]]
    assert "cannot be read" in sentences[0]
    assert "the row has no prompt or messages or text or input" in sentences[1]
    assert "content" in sentences[2]
    assert f"together at most {CONTEXT}" in sentences[3]
    assert "messages[0].role is 'nobody'" in sentences[4]
    assert all("output" not in answer for answer in found[2:])


def test_an_encoder_embeds(tmp_path: Path) -> None:
    worker = Worker(Answering(encoder, OPTIONS))
    try:
        found = answers(worker, tmp_path / "in.jsonl", [{"text": "a b"}, {"text": ""}, {"text": "a longer text"}])
    finally:
        worker.close()
    assert worker.task == "embed"
    assert len(found[0]["embedding"]) == 32
    assert sum(x * x for x in found[2]["embedding"]) == pytest.approx(1)
    assert "embedding" not in found[1]
    assert "input" in found[1]["error"]


def test_openais_batch_format(chatting: Worker, tmp_path: Path) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], **GREEDY}
    rows = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {**body, "n": 2}},
        {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {**body, "model": "other"}},
        {"custom_id": "d", "method": "GET", "url": "/v1/models", "body": {}},
        {"custom_id": "e", "method": "POST", "url": "/v1/chat/completions", "body": {**body, "stream": True}},
        "no json",
    ]
    worker = Worker(Answering(generator, OPTIONS, openai=True))
    try:
        found = answers(worker, tmp_path / "in.jsonl", rows)
    finally:
        worker.close()
    assert [line["custom_id"] for line in found] == ["a", "b", "c", "d", "e", None]
    assert len({line["id"] for line in found}) == len(rows)
    assert [line["response"] and line["response"]["status_code"] for line in found] == [200, 200, 404, None, None, None]
    assert [line["error"] is None for line in found] == [True, True, True, False, False, False]
    assert len(found[1]["response"]["body"]["choices"]) == 2
    plain_row = answers(chatting, tmp_path / "plain.jsonl", [{"prompt": "hello"}])[0]
    assert found[0]["response"]["body"]["choices"][0]["message"]["content"] == plain_row["output"]
    assert "stream is set" in found[4]["error"]["message"]


def test_a_model_that_cannot_be_loaded_is_said_once() -> None:
    def broken() -> tuple[Any, Any]:
        raise ValueError("MODEL x does not exist")

    worker = Worker(Answering(broken, OPTIONS))
    found = worker({"slice": ["anything"]})
    assert (found["task"], json.loads(found["answers"][0])) == (["failed"], ["MODEL x does not exist", True])
    worker.close()
