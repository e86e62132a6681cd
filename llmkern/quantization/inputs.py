"""Inputs for observing a model's layers: the caller's calibration data, or random tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["calibration_batches", "random_tokens"]

MAX_TOKENS = 512
"""Texts are cut here: layers see enough of one text in this many tokens."""

RANDOM_SHAPE = (4, 128)
"""Batches and tokens in each, of the random tokens."""


def calibration_batches(model: nn.Module, calib: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Return the keyword arguments of one forward for each entry of `calib`: a text, a tensor (the first argument), or
    a dict.

    Raises TypeError for anything else, and ValueError for no entries, or texts without a tokenizer.
    """
    if isinstance(calib, (str, Tensor, Mapping)) or not isinstance(calib, Iterable):
        raise TypeError(f"quantize_: calib is a {type(calib).__name__}, expected a list of texts, tensors or dicts")
    entries = list(calib)
    if not entries:
        raise ValueError("quantize_: calib is empty, expected at least one text, tensor or dict")
    return [_batch(model, entry, tokenizer) for entry in entries]


def _batch(model: nn.Module, entry: Any, tokenizer: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        if tokenizer is None:
            raise ValueError("quantize_: calib has texts, for which tokenizer= is needed")
        entry = tokenizer(entry, return_tensors="pt", truncation=True, max_length=MAX_TOKENS)
    if isinstance(entry, Mapping):
        return dict(entry)
    if isinstance(entry, Tensor):
        return {_first_argument(model): entry}
    raise TypeError(f"quantize_: calib has a {type(entry).__name__}, expected texts, tensors or dicts")


def _first_argument(model: nn.Module) -> str:
    """ "" stands for the positional one."""
    return getattr(model, "main_input_name", "")


def random_tokens(model: nn.Module) -> list[dict[str, Any]]:
    """Uniformly drawn token ids, always the same ones, for a transformers model that takes input_ids; else nothing.

    Random text is no text, but it goes through the embeddings and norms that shape the activations: on
    SmolLM2-135M the channels that are large on it are the ones that are large on prose.
    """
    config = getattr(model, "config", None)
    if config is None or getattr(model, "main_input_name", None) != "input_ids":
        return []
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if not vocabulary:
        return []
    count, length = RANDOM_SHAPE
    positions = getattr(text, "max_position_embeddings", None) or 0
    if positions > 0:  # XLNet says −1, for no limit
        length = min(length, positions // 2 or 1)
    ids = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0), device="cpu")
    decoder = {"decoder_input_ids"} if getattr(config, "is_encoder_decoder", False) else set()
    return [dict.fromkeys({"input_ids"} | decoder, row[None]) for row in ids]
