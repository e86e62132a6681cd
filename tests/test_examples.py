"""The examples run as a user runs them: with the real MiniLM, else with tiny models of random weights."""

from __future__ import annotations

import re
import runpy
import sys
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import llmkern
from llmkern.testing.real_models import load_minilm

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ATTENTION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tokenizer(folder: Path, **options: str) -> int:
    """Save a tokenizer of a few words in the folder; returns how many."""
    words = ["<pad>", "</s>", "<unk>", "The", "weather", "is", "fine", ".", "Why", "sky", "blue", "?"]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=made, **special, **options).save_pretrained(folder)
    return len(words)


def chat(folder: Path) -> list[str]:
    vocabulary = tokenizer(folder, chat_template=CHAT)
    config = hf.LlamaConfig(vocab_size=vocabulary, **ATTENTION, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    return ["Why is the sky blue?", str(folder)]


def translation(folder: Path) -> list[str]:
    vocabulary = tokenizer(folder)
    sizes = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    config = hf.MarianConfig(vocab_size=vocabulary, **sizes, **heads, **tokens, max_position_embeddings=128)
    hf.MarianMTModel(config).save_pretrained(folder)
    return ["The weather is fine.", str(folder)]


def sentence_search(folder: Path) -> list[str]:
    model, words = load_minilm()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return ["pets asleep", str(folder)]


def speech(folder: Path) -> list[str]:
    vocabulary = tokenizer(folder)
    sizes = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = hf.WhisperConfig(vocab_size=vocabulary, **sizes, **heads, **tokens, max_target_positions=64)
    model = hf.WhisperForConditionalGeneration(config)
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    model.save_pretrained(folder)
    hf.WhisperFeatureExtractor().save_pretrained(folder)
    with wave.open(str(folder / "speech.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((np.sin(np.arange(16000) / 8) * 9000).astype(np.int16).tobytes())
    return [str(folder / "speech.wav"), str(folder)]


def images(folder: Path) -> list[str]:
    from PIL import Image

    hf.ViTForImageClassification(hf.ViTConfig(**ATTENTION, image_size=32, patch_size=8)).save_pretrained(folder)
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    Image.new("RGB", (40, 30), (200, 90, 10)).save(folder / "photo.png")
    return [str(folder / "photo.png"), str(folder)]


def recommender(folder: Path) -> list[str]:
    return []


@pytest.mark.parametrize("arguments", [chat, translation, sentence_search, speech, images, recommender])
def test_example(arguments: Callable[[Path], list[str]], tmp_path: Path, monkeypatch, capsys) -> None:
    """What was swapped is printed, and the speed of both; the model at the end is an optimized one."""
    script = EXAMPLES / f"{arguments.__name__}.py"
    monkeypatch.setattr(sys, "argv", [str(script), *arguments(tmp_path)])
    scope = runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert llmkern.is_optimized(scope["model"])
    assert str(llmkern.report(scope["model"])) in printed
    assert re.search(r"\d swapped", printed)
    assert re.search(r"untouched \d[\d,.]*.*, optimized \d[\d,.]*", printed.splitlines()[-1])


def test_every_example_is_run_and_short() -> None:
    """A user copies what is below the docstring: at most forty lines."""
    here = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    run = {chat, translation, sentence_search, speech, images, recommender}
    assert set(here) - {"jax_llama"} == {function.__name__ for function in run}  # that one has a test of its own
    for name in set(here) - {"jax_llama"}:
        assert len(here[name].split('"""', 2)[2].strip().splitlines()) <= 40, name
