"""What the tests of llmkern.KVCache share: configs, states, and ways to do to it what is done to a DynamicCache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig

import llmkern

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
HEADS, DIM, VALUE_DIM = 3, 16, 8
WINDOW = 6
HYBRID = ("full_attention", "sliding_attention")


def config(*kinds: str) -> LlamaConfig:
    made = LlamaConfig(num_hidden_layers=len(kinds), num_attention_heads=HEADS, hidden_size=HEADS * DIM)
    made.layer_types = list(kinds)
    made.sliding_window = WINDOW
    return made


def states(tokens: int, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # As the projections give them: tokens before heads in memory.
    k, v = [torch.randn(batch, tokens, HEADS, d, generator=generator, dtype=dtype) for d in (DIM, VALUE_DIM)]
    return k.transpose(1, 2), v.transpose(1, 2)


def mask_sizes(cache: Any, queries: int, layer: int) -> Any:
    return cache.get_mask_sizes(torch.arange(queries) if TRANSFORMERS_4 else queries, layer)


def both(*kinds: str) -> tuple[Any, Any]:
    return llmkern.KVCache(config(*kinds)), DynamicCache(config=config(*kinds))


def assert_same(got: Any, expected: Any) -> None:
    assert len(got.layers) == len(expected.layers)
    for i, (ours, theirs) in enumerate(zip(got.layers, expected.layers, strict=True)):
        assert got.get_seq_length(i) == expected.get_seq_length(i)
        for queries in (1, 5):
            assert mask_sizes(got, queries, i) == mask_sizes(expected, queries, i)
        if theirs.keys is not None and theirs.keys.numel():
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)


def update(cache: Any, tokens: int, seed: int = 0, **options: Any) -> list[tuple[Tensor, Tensor]]:
    return [cache.update(*states(tokens, seed=seed + 100 * i, **options), i) for i in range(len(cache.layers) or 2)]


def update_both(got: Any, expected: Any, tokens: int, **options: Any) -> None:
    for ours, theirs in zip(update(got, tokens, **options), update(expected, tokens, **options), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert_same(got, expected)


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "crop": lambda cache: cache.crop(-2),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(3),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    **({} if TRANSFORMERS_4 else {"crop nothing": lambda cache: cache.crop(0)}),  # its crop(0) forgets everything
    "select by mask": lambda cache: cache.batch_select_indices(torch.tensor([False, True])),
}
