"""All layers of a decoder in one call: the bits of one call for each, whatever model, cache and way to use them."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
import transformers as hf
from layer_models import (
    APART,
    DECODER,
    DECODERS,
    PADDED,
    TOGETHER,
    TOKENS,
    Record,
    Sequence,
    built,
    decoders,
    layers_alone,
    needs_kernels,
    optimized,
    pieces,
    recorded,
    whole_layers,
)
from torch import Tensor

import llmkern
from llmkern import dispatch
from llmkern.config import settings
from llmkern.testing.compare import assert_as_accurate
from llmkern.testing.float64 import Float64

pytestmark = [pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning"), needs_kernels]


def together(make: Any) -> list[str]:
    """What this family's forward calls: Qwen2's layers have different windows here, and so different masks."""
    return TOGETHER * 2 if make is DECODERS["qwen2"] else TOGETHER


@decoders
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16, "int8"], ids=str)
@pytest.mark.parametrize("cached", [None, "int8"])
@torch.no_grad()
def test_the_bits_are_those_of_one_layer_after_the_other(make, weights, cached) -> None:
    model = built(make, torch.float32 if weights == "int8" else weights)
    if weights == "int8":
        llmkern.quantize_(model)
        model.model.layers[1].mlp.down_proj.scheme = "w8a16"  # so that the layers' schemes differ
    llmkern.optimize_(model)
    ours, alone = (llmkern.KVCache(model.config, dtype=cached) for _ in range(2))
    for tokens in pieces(TOKENS):
        out: list[Tensor] = []
        called = whole_layers(lambda tokens=tokens, out=out: out.append(model(tokens, past_key_values=ours).logits))
        assert called == together(make)
        with layers_alone():
            assert torch.equal(out[0], model(tokens, past_key_values=alone).logits)
    for mine, other in zip(ours.layers, alone.layers, strict=True):
        assert torch.equal(mine.keys, other.keys)
        assert torch.equal(mine.values, other.values)


@decoders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_prompt_and_steps_are_as_accurate_as_untouched(make, dtype, padded) -> None:
    reference, model = built(make, dtype), optimized(make, dtype)
    mask = PADDED if padded else torch.ones_like(PADDED)
    with Float64():
        exact = reference(TOKENS, attention_mask=mask).logits
    caches = [llmkern.KVCache(model.config) for _ in range(2)]
    found: list[list[Tensor]] = [[], []]
    end = 0
    for tokens in pieces(TOKENS):
        end += tokens.shape[1]
        for i, each in enumerate((reference, model)):
            out = each(tokens, attention_mask=mask[:, :end], past_key_values=caches[i])
            found[i].append(out.logits)
    baseline, out = (torch.cat(logits, dim=1)[mask.bool()] for logits in found)
    assert_as_accurate(out, baseline=baseline, exact=exact[mask.bool()])


@decoders
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generate_computes_every_token_together(make, padded, options) -> None:
    rows = slice(1) if "prompt_lookup_num_tokens" in options else slice(None)
    inputs = {"input_ids": TOKENS[rows]} | ({"attention_mask": PADDED[rows]} if padded else {})
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8} | options
    expected = built(make).generate(**inputs, **options)
    model, found = optimized(make), []
    called = whole_layers(lambda: found.append(model.generate(**inputs, **options)))
    assert torch.equal(found[0], expected)
    assert set(called) == set(together(make))
    assert len(called) >= 3


@decoders
@torch.no_grad()
def test_without_a_cache(make) -> None:
    reference, model = built(make), optimized(make)
    expected, out = reference(TOKENS, use_cache=False).logits, []
    for _ in range(2):
        called = whole_layers(lambda: out.append(model(TOKENS, use_cache=False).logits))
        assert called == together(make)
    torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(out[0], out[1])


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gemma"])  # those without a window
@torch.no_grad()
def test_a_cropped_cache_goes_on(name) -> None:
    sequence = Sequence(built(DECODERS[name]), optimized(DECODERS[name]))
    for crop, row in ((3, TOKENS[:1]), (9, TOKENS[1:])):
        for tokens in pieces(row):
            assert sequence.give(tokens) == TOGETHER
        sequence.crop(-crop)
    assert sequence.give(TOKENS[:1]) == TOGETHER


@torch.no_grad()
def test_caches_of_two_sequences_by_turns() -> None:
    untouched, model = built(DECODERS["llama"]), optimized(DECODERS["llama"])
    sequences = [Sequence(untouched, model) for _ in range(2)]
    for first, second in zip(pieces(TOKENS), pieces(TOKENS.flip(0, 1)[:1]), strict=True):
        assert sequences[0].give(first) == TOGETHER
        assert sequences[1].give(second) == TOGETHER


@torch.no_grad()
def test_a_copy_and_its_model_by_turns() -> None:
    untouched, model = built(DECODERS["llama"]), optimized(DECODERS["llama"])
    model(TOKENS)
    copied, other = copy.deepcopy(model), copy.deepcopy(untouched)
    for each in (copied, other):
        each.model.layers[1].mlp.down_proj.weight.mul_(2)
    sequences = [Sequence(untouched, model), Sequence(other, copied)]
    for tokens in pieces(TOKENS):
        for sequence in sequences:
            assert sequence.give(tokens) == TOGETHER


@torch.no_grad()
def test_a_pickled_model_is_untouched_and_can_be_optimized() -> None:
    untouched, model = built(DECODERS["llama"]), optimized(DECODERS["llama"])
    model(TOKENS)
    loaded = pickle.loads(pickle.dumps(model))
    assert Sequence(untouched, loaded).give(TOKENS) == []
    llmkern.optimize_(loaded)
    for each in (loaded, model):
        assert Sequence(untouched, each).give(TOKENS) == TOGETHER


@torch.no_grad()
def test_restored_and_optimized_again() -> None:
    untouched, model = built(DECODERS["llama"]), optimized(DECODERS["llama"])
    sequence = Sequence(untouched, model)
    first, second, *_ = pieces(TOKENS)
    assert sequence.give(first) == TOGETHER
    llmkern.restore_(model)
    assert sequence.give(second) == []
    llmkern.optimize_(model)
    assert Sequence(untouched, model).give(TOKENS) == TOGETHER
    assert torch.equal(llmkern.restore_(model)(TOKENS).logits, untouched(TOKENS).logits)


@torch.no_grad()
def test_without_a_cache_of_ours_too() -> None:
    model = built(DECODERS["llama"])
    llmkern.optimize_(model, kv_cache=None)
    assert Sequence(built(DECODERS["llama"]), model).give(TOKENS) == TOGETHER


@torch.no_grad()
def test_other_caches_are_left_to_the_layers() -> None:
    untouched, model = built(DECODERS["llama"]), optimized(DECODERS["llama"])
    for make in (hf.DynamicCache, lambda config: hf.StaticCache(config=config, max_cache_len=32)):
        sequence = Sequence(untouched, model)
        sequence.caches = [make(config=model.config) for _ in range(2)]
        for tokens in pieces(TOKENS):
            assert TOGETHER[0] not in sequence.give(tokens)


@torch.no_grad()
def test_layers_of_a_cache_that_are_not_alike() -> None:
    """One that holds fewer tokens, or codes: each layer of the model reads its own."""
    untouched, model = built(DECODERS["llama"]), optimized(DECODERS["llama"])
    sequence = Sequence(untouched, model)
    sequence.give(TOKENS)
    for cache in sequence.caches:
        cache.layers[1].crop(-4)
    assert sequence.give(TOKENS[:, :1]) == APART
    sequence = Sequence(untouched, model)
    for cache in sequence.caches:
        cache.layers[1] = llmkern.KVCache(model.config, dtype="int8").layers[1]
    out: list[Tensor] = []
    for tokens in pieces(TOKENS):
        called = whole_layers(
            lambda tokens=tokens: out.append(model(tokens, past_key_values=sequence.caches[1]).logits)
        )
        assert called == APART
        expected = untouched(tokens, past_key_values=sequence.caches[0]).logits
        assert (out[-1] - expected).norm() <= 0.03 * expected.norm()


@pytest.mark.parametrize("quantize", [False, True])
@torch.no_grad()
def test_any_number_of_threads_gives_the_same_bits(quantize) -> None:
    config = hf.LlamaConfig(
        vocab_size=67, hidden_size=256, intermediate_size=640, num_attention_heads=8, num_key_value_heads=2
    )
    config.num_hidden_layers = 3
    model = built(lambda: hf.LlamaForCausalLM(config))
    if quantize:
        llmkern.quantize_(model)
    llmkern.optimize_(model)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            cache = llmkern.KVCache(model.config)
            found.append([model.model(t, past_key_values=cache).last_hidden_state for t in pieces(TOKENS[:1])])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@torch.no_grad()
def test_threads_that_decode_at_once() -> None:
    """Each with its cache, and with torch's threads besides."""
    model = optimized(DECODERS["llama"])
    options = {"do_sample": False, "max_new_tokens": 40, "min_new_tokens": 40}
    expected = [model.generate(TOKENS[i : i + 1], **options) for i in range(2)]
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    def decode(i: int) -> None:
        for _ in range(3):
            found[i].append(model.generate(TOKENS[i : i + 1], **options))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads = [threading.Thread(target=decode, args=(i,)) for i in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    for i, tokens in found.items():
        assert len(tokens) == 3
        assert all(torch.equal(each, expected[i]) for each in tokens)


@torch.no_grad()
def test_who_listens_chooses_or_is_strict_sees_what_runs_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    untouched, model = built(DECODERS["llama"]), optimized(DECODERS["llama"])
    sequence = Sequence(untouched, model)
    first, second, third, fourth = pieces(TOKENS)
    assert sequence.give(first) == TOGETHER
    record = Record()
    with dispatch.recording(record):
        assert sequence.give(second) == TOGETHER
    assert record.ops.count("layers_") == 1
    assert not record.reasons
    with llmkern.use_backend("cpu"):
        assert sequence.give(third) == TOGETHER
    with monkeypatch.context() as patch:
        patch.setattr(settings, "strict", True)
        assert sequence.give(fourth) == TOGETHER
    (row,) = [row for row in llmkern.explain(model, TOKENS) if row.op == "layers_"]
    assert (row.site, row.backend, row.shapes) == ("model", "cpu", {"hidden": (2, 10, 32)})


@torch.no_grad()
def test_another_backend_is_given_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    untouched, model = built(DECODERS["llama"]), optimized(DECODERS["llama"])
    sequence = Sequence(untouched, model)
    first, second, third, _ = pieces(TOKENS)
    with llmkern.use_backend("torch"):
        assert sequence.give(first) == []
        reason = "layers_: the forced backend 'torch' cannot serve this call: it does not implement layers_"
        assert reason in recorded(lambda: model(TOKENS)).reasons
    with llmkern.use_backend("reference"):
        record = recorded(lambda: model(TOKENS, use_cache=False))
    assert record.ops.count("layers_") == 1
    assert not record.reasons
    assert [sequence.give(tokens) for tokens in (second, third)] == [TOGETHER, TOGETHER]


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
@torch.no_grad()
def test_what_is_collected_comes_from_layers_one_by_one(option) -> None:
    """And the tokens after that from all layers together."""
    config = hf.LlamaConfig(**DECODER, attn_implementation="eager")
    untouched, model = built(lambda: hf.LlamaForCausalLM(config)), optimized(lambda: hf.LlamaForCausalLM(config))
    name = option.removeprefix("output_")
    for _ in range(2):
        sequence, collecting = Sequence(untouched, model), Sequence(untouched, model)
        for tokens in pieces(TOKENS):
            assert sequence.give(tokens) == TOGETHER
        for tokens in pieces(TOKENS):
            pairs = zip(collecting.models, collecting.caches, strict=True)
            out: list[Any] = [each(tokens, past_key_values=cache, **{option: True}) for each, cache in pairs]
            for mine, other in zip(out[1][name], out[0][name], strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
        assert TOGETHER[0] not in whole_layers(lambda: model(TOKENS, **{option: True}))


@torch.no_grad()
def test_gradients_and_autocast_by_turns() -> None:
    untouched, model = built(DECODERS["llama"]), optimized(DECODERS["llama"])
    first, second, third, fourth = pieces(TOKENS)
    sequence = Sequence(untouched, model)
    assert sequence.give(first) == TOGETHER
    with torch.enable_grad():
        assert sequence.give(second) == []
    with torch.autocast("cpu", torch.bfloat16):
        assert whole_layers(lambda: model(TOKENS)) == []
    assert sequence.give(third) == TOGETHER
    with torch.inference_mode():
        assert sequence.give(fourth) == TOGETHER


@torch.no_grad()
def test_nothing_keeps_weights_that_no_model_has() -> None:
    def used() -> Any:
        model = optimized(DECODERS["phi3"])
        model(TOKENS)
        return model

    model = used()
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert not [weight for weight in weights if weight() is not None]

    model, cache = used(), llmkern.KVCache()
    model(TOKENS, past_key_values=cache)
    replaced = weakref.ref(model.model.layers[1].mlp.down_proj.weight)
    llmkern.quantize_(model)
    model(TOKENS[:, :1], past_key_values=cache)
    gc.collect()
    assert replaced() is None

    model = used()
    replaced = weakref.ref(model.model.layers[1].mlp.down_proj.weight)
    llmkern.restore_(model)
    llmkern.quantize_(model)
    gc.collect()
    assert replaced() is None
