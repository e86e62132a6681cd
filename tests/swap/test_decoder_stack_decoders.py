"""Decoders that call their layers in another way, or other layers: computed one by one, never wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from layer_models import (
    APART,
    DECODERS,
    PROMPT,
    STEPS,
    TOGETHER,
    TOKENS,
    Sequence,
    built,
    give_class,
    needs_kernels,
    optimized,
    whole_layers,
)
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

import llmkern

pytestmark = [pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning"), needs_kernels]


def truncated(model: Any) -> list[str]:
    model.config.num_hidden_layers = 1
    return APART[:1]


def without_the_last(model: Any) -> list[str]:
    del model.model.layers[1]
    model.config.num_hidden_layers = 1
    return TOGETHER


def without_the_first(model: Any) -> list[str]:
    """Its cache goes by numbers that are no longer those of the layers."""
    del model.model.layers[0]
    model.config.num_hidden_layers = 1
    return APART[:1]


def with_another(model: Any) -> list[str]:
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    model.model.layers[2].self_attn.layer_idx = 2
    model.config.num_hidden_layers = 3
    return TOGETHER


def exchanged(model: Any) -> list[str]:
    model.model.layers[0], model.model.layers[1] = model.model.layers[1], model.model.layers[0]
    return APART


def of_another_class(model: Any) -> list[str]:
    own = type(model.model.layers[0]).forward

    def forward(self: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
        return own(self, x, **kwargs) + 1

    for layer in model.model.layers:
        give_class(layer, forward)
    model.model.layers[1].__class__ = type(model.model.layers[0])
    return APART


def in_another_list(model: Any) -> list[str]:
    class Backwards(nn.ModuleList):
        def __iter__(self) -> Any:
            return reversed(list(super().__iter__()))

        def __getitem__(self, index: Any) -> Any:
            return self if isinstance(index, slice) else super().__getitem__(index)

    model.model.layers = Backwards(model.model.layers)
    return APART


def without_the_last_in_another_list(model: Any) -> list[str]:
    class Shorter(nn.ModuleList):
        def __getitem__(self, index: Any) -> Any:
            return list(self)[:1] if isinstance(index, slice) else super().__getitem__(index)

    model.model.layers = Shorter(model.model.layers)
    return APART[:1]


def wrapped(model: Any) -> list[str]:
    class AddsOne(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return self.layer(x + 1, **kwargs)

    model.model.layers[1] = AddsOne(model.model.layers[1])
    return APART


@pytest.mark.parametrize(
    "change",
    [
        *(truncated, without_the_last, without_the_first, with_another, exchanged, wrapped),
        *(of_another_class, in_another_list, without_the_last_in_another_list),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_other_layers(change, cached) -> None:
    untouched, model = built(DECODERS["llama"]), optimized(DECODERS["llama"])
    assert Sequence(untouched, model).give(TOKENS) == TOGETHER
    before = untouched(TOKENS).logits
    change(untouched)
    expected = change(model)
    assert (untouched(TOKENS, use_cache=False).logits - before).abs().max() > 0.01
    if not cached:
        out: list[Tensor] = []
        assert whole_layers(lambda: out.append(model(TOKENS, use_cache=False).logits)) == expected
        torch.testing.assert_close(out[0], untouched(TOKENS, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    elif change is not without_the_first:  # transformers asks the first layer of the cache for its length
        sequence = Sequence(untouched, model)
        for tokens in (PROMPT, *STEPS):
            assert sequence.give(tokens) == expected


# Decoders of other sources.  They mention DynamicCache: only a forward that may make one is swapped.
def prepared(decoder: Any, tokens: Tensor, cache: Any) -> tuple[Tensor, dict[str, Any]]:
    """What all of these decoders give their layers."""
    x = decoder.embed_tokens(tokens)
    new, past = x.shape[1], 0 if cache is None else cache.get_seq_length()
    mask = torch.ones(new, past + new, dtype=torch.bool).tril(past)[None, None]
    angles = decoder.rotary_emb(x, torch.arange(past, past + new)[None])
    return x, {"attention_mask": mask, "position_embeddings": angles, "past_key_values": cache}


def ended(decoder: Any, x: Tensor, cache: Any) -> BaseModelOutputWithPast:
    return BaseModelOutputWithPast(last_hidden_state=decoder.norm(x), past_key_values=cache)


class OneAfterTheOther(hf.LlamaModel):
    def forward(self, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> Any:
        assert isinstance(past_key_values, DynamicCache | None)
        x, given = prepared(self, input_ids, past_key_values)
        for layer in self.layers:
            x = layer(x, **given)
        return ended(self, x, past_key_values)


class TupleForEach(hf.LlamaModel):
    def forward(self, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> Any:
        assert isinstance(past_key_values, DynamicCache | None)
        x, given = prepared(self, input_ids, past_key_values)
        cos, sin = given.pop("position_embeddings")
        for layer in self.layers:
            x = layer(x, position_embeddings=(cos, sin), **given)
        return ended(self, x, past_key_values)


def alone(given: dict[str, Any]) -> dict[str, Any]:
    """The same for a layer for which the cache has no place."""
    mask = given["attention_mask"]
    return given | {"attention_mask": mask[..., -mask.shape[-2] :], "past_key_values": None}


class OneMoreAfterThem(hf.LlamaModel):
    def forward(self, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> Any:
        assert isinstance(past_key_values, DynamicCache | None)
        x, given = prepared(self, input_ids, past_key_values)
        for layer in self.layers:
            x = layer(x, **given)
        x = self.last(x, **alone(given))
        return ended(self, x, past_key_values)


class OneMoreBeforeThem(hf.LlamaModel):
    def forward(self, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> Any:
        assert isinstance(past_key_values, DynamicCache | None)
        x, given = prepared(self, input_ids, past_key_values)
        x = self.last(x, **alone(given))
        for layer in self.layers:
            x = layer(x, **given)
        return ended(self, x, past_key_values)


class TwoMasks(hf.LlamaModel):
    def forward(self, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> Any:
        assert isinstance(past_key_values, DynamicCache | None)
        x, given = prepared(self, input_ids, past_key_values)
        full = given.pop("attention_mask")
        masks = {"full_attention": full, "sliding_attention": full.triu(full.shape[-1] - full.shape[-2] - 2)}
        for i, layer in enumerate(self.layers):
            x = layer(x, attention_mask=masks[self.config.layer_types[i]], **given)
        return ended(self, x, past_key_values)


class ByAProperty(hf.LlamaModel):
    def forward(self, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> Any:
        assert isinstance(past_key_values, DynamicCache | None)
        x, given = prepared(self, input_ids, past_key_values)
        for layer in self.wanted:
            x = layer(x, **given)
        return ended(self, x, past_key_values)

    @property
    def wanted(self) -> list[nn.Module]:
        return list(self.layers)


class Twice(hf.LlamaModel):
    """Each layer has seen its own tokens when it is called again."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> Any:
        assert isinstance(past_key_values, DynamicCache | None)
        x, given = prepared(self, input_ids, None)
        for _turn in range(2):
            for layer in self.layers:
                x = layer(x, **given)
        return ended(self, x, past_key_values)


class ShiftedBetweenThem(hf.LlamaModel):
    def forward(self, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> Any:
        assert isinstance(past_key_values, DynamicCache | None)
        x, given = prepared(self, input_ids, past_key_values)
        for layer in self.layers:
            x = layer(x, **given)
            x = x + 1
        return ended(self, x, past_key_values)


def with_decoder(cls: Any, model: Any) -> Any:
    model.model.__class__ = cls
    if cls is TwoMasks:
        model.config.layer_types = ["full_attention", "sliding_attention"]
        model.config.sliding_window = 64  # of the cache
    if cls in (OneMoreAfterThem, OneMoreBeforeThem):
        model.model.last = copy.deepcopy(model.model.layers[0])
    return model


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (OneAfterTheOther, TOGETHER),
        (TupleForEach, APART),
        (OneMoreAfterThem, [*TOGETHER, *APART[:1]]),
        (OneMoreBeforeThem, [*APART[:1], *TOGETHER]),
        (TwoMasks, TOGETHER * 2),
        (ByAProperty, APART),
        (Twice, [*TOGETHER, *TOGETHER]),
        (ShiftedBetweenThem, APART),
    ],
)
@torch.no_grad()
def test_other_decoders(cls, expected) -> None:
    untouched, model = [with_decoder(cls, built(DECODERS["llama"])) for _ in range(2)]
    llmkern.optimize_(model)
    sequence = Sequence(untouched, model)
    for tokens in (PROMPT, *STEPS):
        assert sequence.give(tokens) == expected


def adds_one_before(call: Any, layer: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    return call(layer, x + 1, **kwargs)


def adds_one_after(call: Any, layer: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    return call(layer, x, **kwargs) + 1


def leaves_it_out(call: Any, layer: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    return x


def gives_another_mask(call: Any, layer: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    return call(layer, x, **kwargs | {"attention_mask": torch.zeros(1, 1, x.shape[1], x.shape[1])})


def calls_it_twice(call: Any, layer: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    return call(layer, call(layer, x, **kwargs), **kwargs)


def call_instead(patch: pytest.MonkeyPatch, layer: nn.Module, instead: Any) -> None:
    """Replaces the class's own __call__ for one of its layers."""
    call = nn.Module.__call__

    def replaced(self: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
        return instead(call, self, x, **kwargs) if self is layer else call(self, x, **kwargs)

    patch.setattr(type(layer), "__call__", replaced)


@pytest.mark.parametrize("index", range(2))
@pytest.mark.parametrize(
    "instead", [adds_one_before, adds_one_after, leaves_it_out, gives_another_mask, calls_it_twice]
)
@torch.no_grad()
def test_a_call_of_a_layer_that_means_something_else(index, instead, monkeypatch: pytest.MonkeyPatch) -> None:
    untouched, model = built(DECODERS["llama"]), optimized(DECODERS["llama"])
    expected = [each(TOKENS, use_cache=False).logits for each in (untouched, model)]
    for each in (untouched, model):
        call_instead(monkeypatch, each.model.layers[index], instead)
    found = untouched(TOKENS, use_cache=False).logits
    assert (found - expected[0]).abs().max() > 0.01
    for _ in range(2):
        torch.testing.assert_close(model(TOKENS, use_cache=False).logits, found, rtol=1e-4, atol=1e-4)
    monkeypatch.undo()
    assert torch.equal(model(TOKENS, use_cache=False).logits, expected[1])
