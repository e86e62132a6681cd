"""The cache that an optimized model makes where the caller chooses none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StaticCache
from zoo import ZOO, Entry

import llmkern
from llmkern.integrations.transformers.kv_layers import Int8KVLayer, KVLayer

pytestmark = pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning")

DECODERS = [entry for entry in ZOO if entry.kind == "decoder"]
LLAMA = next(entry for entry in ZOO if entry.name == "llama")
T5 = next(entry for entry in ZOO if entry.name == "t5")
every_decoder = pytest.mark.parametrize("entry", DECODERS, ids=str)


def optimized(entry: Entry = LLAMA, **options: Any) -> Any:
    model = entry.build()
    llmkern.optimize_(model, **options)
    return model


def tokens(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True} | options
    return model.generate(**inputs, **settings)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 2, "eos_token_id": 100},  # transformers 4 needs one
}


@every_decoder
@pytest.mark.parametrize("way", WAYS)
def test_generates_what_a_dynamic_cache_generates(entry: Entry, way: str) -> None:
    inputs = entry.inputs(padding="left" if way != "prompt lookup" else "none")
    if way == "prompt lookup":
        inputs = {name: value[:1] for name, value in inputs.items()}
    results = []
    for kv_cache in ("auto", None):
        model = optimized(entry, kv_cache=kv_cache)
        torch.manual_seed(0)
        results.append(tokens(model, inputs, **WAYS[way]))
    assert type(results[0].past_key_values) is llmkern.KVCache
    assert type(results[1].past_key_values) is DynamicCache
    assert torch.equal(results[0].sequences, results[1].sequences)


@every_decoder
@torch.no_grad()
def test_a_forward_makes_one_too(entry: Entry) -> None:
    model, inputs = optimized(entry), entry.inputs()
    without = optimized(entry, kv_cache=None)
    first, expected = model(**inputs, use_cache=True), without(**inputs, use_cache=True)
    assert type(first.past_key_values) is llmkern.KVCache
    assert torch.equal(first.logits, expected.logits)
    step = inputs["input_ids"][:, -1:]
    again = model(input_ids=step, past_key_values=first.past_key_values)
    expected_again = without(input_ids=step, past_key_values=expected.past_key_values)
    torch.testing.assert_close(again.logits, expected_again.logits)


def test_what_the_caller_chooses_is_left() -> None:
    model, inputs = optimized(), LLAMA.inputs()
    assert type(tokens(model, inputs, past_key_values=DynamicCache()).past_key_values) is DynamicCache
    assert type(tokens(model, inputs, cache_implementation="dynamic").past_key_values) is DynamicCache
    assert type(tokens(model, inputs, cache_implementation="static").past_key_values) is StaticCache
    assert tokens(model, inputs, use_cache=False).past_key_values is None
    own = llmkern.KVCache()
    assert tokens(model, inputs, past_key_values=own).past_key_values is own
    with torch.no_grad():
        assert type(model(**inputs, past_key_values=DynamicCache()).past_key_values) is DynamicCache
        assert model(**inputs, use_cache=False).past_key_values is None


def test_forwards_with_gradients_and_compiled_ones_keep_transformers_own() -> None:
    model, inputs = optimized(), LLAMA.inputs()
    assert type(model(**inputs, use_cache=True).past_key_values) is DynamicCache
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert type(compiled(**inputs, use_cache=True).past_key_values) is DynamicCache


@torch.no_grad()
def test_a_compiled_model_takes_one() -> None:
    model, inputs = optimized(), LLAMA.inputs()
    expected = tokens(model, inputs, max_new_tokens=6).sequences
    graphs = 0

    def counting(graph: Any, example_inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    model.forward = torch.compile(model.forward, backend=counting, fullgraph=True)
    assert torch.equal(tokens(model, inputs, max_new_tokens=6).sequences, expected)
    assert graphs <= 4  # prefill, the first step, and steps of any length


def test_assisted_generation_rolls_it_back() -> None:
    inputs = {name: value[:1] for name, value in LLAMA.inputs().items()}
    expected = tokens(LLAMA.build(), inputs).sequences
    assistant = LLAMA.build()
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.02 * torch.randn_like(assistant.lm_head.weight))  # right now and then
    llmkern.optimize_(assistant)
    out = tokens(optimized(), inputs, assistant_model=assistant)
    assert type(out.past_key_values) is llmkern.KVCache
    assert torch.equal(out.sequences, expected)


def test_int8_is_made_where_asked_for() -> None:
    model, inputs = optimized(kv_cache="int8"), LLAMA.inputs()
    out = tokens(model, inputs)
    assert [type(layer) for layer in out.past_key_values.layers] == [Int8KVLayer, Int8KVLayer]
    report = llmkern.report(llmkern.optimize_(model)).swap  # "auto" leaves what is there
    assert [row.backend for row in report if row.kind == "cache"] == ["KVCache int8"]
    assert torch.equal(tokens(model, inputs).sequences, out.sequences)
    assert [
        row.backend for row in llmkern.report(llmkern.optimize_(model, kv_cache="int8")).swap if row.kind == "cache"
    ] == ["KVCache int8"]
    model = optimized()
    llmkern.optimize_(model, kv_cache="int8")
    assert type(tokens(model, inputs).past_key_values.layers[0]) is Int8KVLayer


def test_it_can_be_left_out_and_is_undone() -> None:
    model, inputs = LLAMA.build(), LLAMA.inputs()
    cls, inner = type(model), type(model.model)
    report = llmkern.report(llmkern.optimize_(model, kv_cache=None, loss=False)).swap
    assert [(row.action, row.reason) for row in report if row.kind == "cache"] == [
        ("left", "switched off by kv_cache=None")
    ]
    assert type(model) is cls
    llmkern.optimize_(model)
    assert type(model) is not cls
    assert type(model).__name__ == cls.__name__
    assert type(tokens(copy.deepcopy(model), inputs).past_key_values) is llmkern.KVCache
    llmkern.restore_(model)
    assert type(model) is cls
    assert type(model.model) is inner
    assert type(tokens(model, inputs).past_key_values) is DynamicCache


@pytest.mark.parametrize("choice", ["auto", "int8"])
@torch.no_grad()
def test_of_an_encoder_decoder_for_the_decoders_own_tokens(choice: str) -> None:
    model, inputs = T5.build(), T5.inputs()
    (row,) = [row for row in llmkern.report(llmkern.optimize_(model, kv_cache=choice)).swap if row.kind == "cache"]
    assert row.action == "swapped"
    given = tokens(model, inputs).past_key_values, model(**inputs, use_cache=True).past_key_values
    for cache in given:
        assert type(cache) is transformers.EncoderDecoderCache
        assert type(cache.self_attention_cache) is llmkern.KVCache
        assert type(cache.self_attention_cache.layers[0]) is (Int8KVLayer if choice == "int8" else KVLayer)
        assert type(cache.cross_attention_cache) is DynamicCache
    chosen = transformers.EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert type(tokens(model, inputs, past_key_values=chosen).past_key_values.self_attention_cache) is DynamicCache
    llmkern.restore_(model)
    assert type(tokens(model, inputs).past_key_values.self_attention_cache) is DynamicCache


def test_a_decoder_with_room_for_an_encoder_keeps_its_own_and_says_so() -> None:
    small = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    model = transformers.BertLMHeadModel(small).eval()
    (row,) = [row for row in llmkern.report(llmkern.optimize_(model)).swap if row.kind == "cache"]
    assert (row.action, row.backend) == ("left", "")
    with pytest.raises(RuntimeError, match="may hold keys and values of an encoder too"):
        llmkern.optimize_(model, kv_cache="int8", on_unsupported="error")


@pytest.mark.skipif(not hasattr(transformers, "MambaConfig"), reason="this transformers has no Mamba")
def test_a_recurrent_model_keeps_its_own_and_says_so() -> None:
    small = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = transformers.MambaForCausalLM(small).eval()
    (row,) = [row for row in llmkern.report(llmkern.optimize_(model)).swap if row.kind == "cache"]
    assert row.action == "left"
    assert "layers keep" in row.reason or "of its own" in row.reason
    ids = torch.arange(1, 6)[None]
    assert not isinstance(model(ids, use_cache=True).cache_params, llmkern.KVCache)


def test_other_values_are_refused() -> None:
    with pytest.raises(ValueError, match="kv_cache is True, expected 'auto' or 'int8' or None"):
        llmkern.optimize_(LLAMA.build(), kv_cache=True)  # type: ignore[arg-type]
