"""Decoders that attend to an encoder: all layers in one call, with the encoder's keys and values kept in the cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES
from layer_models import TOGETHER, Record, built, layers_alone, needs_kernels, recorded, whole_layers
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import llmkern
from llmkern.testing.compare import assert_as_accurate
from llmkern.testing.float64 import Float64

pytestmark = [pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning"), needs_kernels]

MODELS = {
    "whisper": "WhisperForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "marian": "MarianMTModel",
    "t5": "T5ForConditionalGeneration",
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1}
families = pytest.mark.parametrize("name", MODELS)
ENCODED = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones(2, 9, dtype=torch.long)
PADDED[1, 5:] = 0
DECODED = torch.randint(3, 67, (2, 6), generator=torch.Generator().manual_seed(2))


def make(name: str) -> Callable[[], nn.Module]:
    family = FAMILIES[name]
    config = getattr(hf, family.config)(**{**family.options, **_SPECIAL})
    return lambda: getattr(hf, MODELS[name])(config)


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The untouched model, and the optimized one."""
    untouched, model = built(make(name), dtype), built(make(name), dtype)
    for each in (untouched, model):
        each.generation_config.eos_token_id = None
    llmkern.optimize_(model)
    return untouched, model


def encoded(model: Any, padded: bool = False) -> dict[str, Any]:
    """What the decoder is given of the encoder."""
    if isinstance(model, hf.WhisperForConditionalGeneration):
        frames = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(3))
        return {"encoder_outputs": model.get_encoder()(frames.to(model.dtype))}
    mask = {"attention_mask": PADDED} if padded else {}
    return {"encoder_outputs": model.get_encoder()(ENCODED, **mask), **mask}


def caches(model: Any) -> EncoderDecoderCache:
    return EncoderDecoderCache(llmkern.KVCache(model.config), DynamicCache())


def steps(model: Any, given: dict[str, Any], cache: Any, sizes: tuple[int, ...] = (3, 1, 1, 1)) -> Tensor:
    """Logits of a prompt and of steps."""
    found = [
        model(decoder_input_ids=tokens, past_key_values=cache, use_cache=True, **given).logits
        for tokens in DECODED.split(sizes, 1)
    ]
    return torch.cat(found, 1)


@families
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_computes_every_token_together(name, beams) -> None:
    untouched, model = pair(name)
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams}
    options["return_dict_in_generate"] = True
    inputs = {"input_ids": ENCODED, "attention_mask": PADDED}
    if name == "whisper":
        inputs = {"input_features": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(3))}
    expected, found = untouched.generate(**inputs, **options), []
    called = whole_layers(lambda: found.append(model.generate(**inputs, **options)))
    assert torch.equal(found[0].sequences, expected.sequences)
    assert called == ["all layers"] * len(called)
    assert len(called) >= 5
    cache = found[0].past_key_values
    assert name == "whisper" or (type(cache.self_attention_cache), type(cache.cross_attention_cache)) == (
        llmkern.KVCache,
        DynamicCache,
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in ("whisper", "marian", "t5")),
        ("bart", torch.bfloat16),
        ("t5", torch.bfloat16),
    ],
)
@torch.no_grad()
def test_prompt_and_steps_are_as_accurate_as_untouched(name, dtype) -> None:
    untouched, model = pair(name, dtype)
    given = encoded(untouched, padded=True)
    with Float64():
        exact = steps(untouched, given, EncoderDecoderCache(DynamicCache(), DynamicCache()))
    baseline = steps(untouched, given, EncoderDecoderCache(DynamicCache(), DynamicCache()))
    out: list[Tensor] = []
    assert whole_layers(lambda: out.append(steps(model, given, caches(model)))) == TOGETHER * 4
    assert_as_accurate(out[0], baseline=baseline, exact=exact)
    without = model(decoder_input_ids=DECODED, use_cache=False, **given).logits
    assert_as_accurate(without, baseline=baseline, exact=exact)


@pytest.mark.parametrize(("name", "weights"), [("t5", "fp32"), ("bart", "int8")])
@torch.no_grad()
def test_the_bits_are_those_of_one_layer_after_the_other(name, weights) -> None:
    model = built(make(name))
    if weights == "int8":
        llmkern.quantize_(model)
    llmkern.optimize_(model)
    given, both = encoded(model, padded=True), (caches(model), caches(model))
    out = steps(model, given, both[0])
    with layers_alone():
        called = whole_layers(lambda: torch.testing.assert_close(steps(model, given, both[1]), out, rtol=0, atol=0))
    assert called == ["a layer"] * 8
    for mine, other in zip(both[0].cross_attention_cache.layers, both[1].cross_attention_cache.layers, strict=True):
        assert torch.equal(mine.keys, other.keys)
        assert torch.equal(mine.values, other.values)


@pytest.mark.parametrize("name", ["marian", "t5"])
@torch.no_grad()
def test_an_encoders_keys_and_values_are_made_once(name) -> None:
    """As in the untouched model: with another encoder's output, later steps go on with the first one's."""
    untouched, model = pair(name)
    given, sides = encoded(untouched), ((untouched, caches(untouched)), (model, caches(model)))
    for each, cache in sides:
        each(decoder_input_ids=DECODED[:, :3], past_key_values=cache, use_cache=True, **given)
    given["encoder_outputs"].last_hidden_state.mul_(2)
    tokens = DECODED[:, 3:4]
    expected, out = [each(decoder_input_ids=tokens, past_key_values=cache, **given).logits for each, cache in sides]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    sides[1][1].reset()
    fresh, again = [
        each(decoder_input_ids=tokens, past_key_values=cache, **given).logits
        for each, cache in ((untouched, EncoderDecoderCache(DynamicCache(), DynamicCache())), sides[1])
    ]
    torch.testing.assert_close(again, fresh, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_int8_keys_and_values_are_the_decoders_own() -> None:
    untouched = built(make("bart"))
    model = llmkern.optimize_(built(make("bart")), kv_cache="int8")
    given = encoded(untouched)
    cache = model(decoder_input_ids=DECODED[:, :3], use_cache=True, **given).past_key_values
    assert cache.self_attention_cache.layers[0].k_buffer.dtype is torch.int8
    assert cache.cross_attention_cache.layers[0].keys.dtype is torch.float32
    expected, out = steps(untouched, given, None, (6,)), []
    call = {"decoder_input_ids": DECODED[:, 3:], "past_key_values": cache, **given}
    assert whole_layers(lambda: out.append(model(**call).logits)) == TOGETHER
    assert nn.functional.cosine_similarity(out[0], expected[:, 3:], -1).min() > 0.99


def _static(model: Any) -> EncoderDecoderCache:
    return EncoderDecoderCache(
        StaticCache(config=model.config, max_cache_len=16), StaticCache(config=model.config, max_cache_len=9)
    )


OTHER_CACHES = {
    "in a StaticCache": _static,
    "the cache is a DynamicCache with tokens": lambda _: EncoderDecoderCache(DynamicCache(), DynamicCache()),
}


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("cached", OTHER_CACHES)
@torch.no_grad()
def test_other_caches_leave_steps_to_the_parts(name, cached) -> None:
    untouched, model = pair(name)
    given = encoded(untouched, padded=True)
    out: list[Tensor] = []
    record = recorded(lambda: out.append(steps(model, given, OTHER_CACHES[cached](model))))
    expected = steps(untouched, given, OTHER_CACHES[cached](untouched))
    torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-4)
    assert any(cached in reason for reason in record.reasons), record.reasons


def _hooked(model: Any) -> dict[str, Any]:
    layer = next(m for n, m in model.get_decoder().named_modules() if n.endswith(("layers.1", "block.1")))
    layer.register_forward_hook(lambda *_: None)
    return {}


def _without_an_encoders_cache(model: Any) -> dict[str, Any]:
    return {"past_key_values": llmkern.KVCache()}


CHANGES: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "a hook": (_hooked, "hook"),
    "outputs": (lambda _: {"output_hidden_states": True}, "outputs of the layers are collected"),
    "weights": (lambda _: {"output_attentions": True}, "attention"),
    "one cache": (_without_an_encoders_cache, "without a place for an encoder's keys and values"),
}


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_the_op_cannot_take(name, change) -> None:
    untouched, model = pair(name)
    apply, reason = CHANGES[change]
    given, outs = encoded(untouched), []
    options = [apply(each) for each in (untouched, model)]
    call = {"decoder_input_ids": DECODED[:, :1], "use_cache": True, **given}
    expected = untouched(**call, **options[0])
    record: Record = recorded(lambda: outs.append(model(**call, **options[1])))
    torch.testing.assert_close(outs[0].logits, expected.logits, rtol=1e-4, atol=1e-4)
    collected = outs[0].decoder_hidden_states or (), expected.decoder_hidden_states or ()
    for mine, theirs in zip(*collected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert any(reason in each for each in record.reasons), record.reasons


@torch.no_grad()
def test_a_decoder_without_an_encoder() -> None:
    config = hf.BartConfig(**{**FAMILIES["bart"].options, **_SPECIAL}, is_decoder=True, is_encoder_decoder=False)
    untouched, model = [built(lambda: hf.BartForCausalLM(config)) for _ in range(2)]
    llmkern.optimize_(model)
    out: list[Any] = []
    record = recorded(lambda: out.append(model(DECODED).logits))
    torch.testing.assert_close(out[0], untouched(DECODED).logits, rtol=1e-4, atol=1e-4)
    assert any("no hidden states of an encoder" in reason for reason in record.reasons)


@torch.no_grad()
def test_places_in_the_cache_that_differ_are_left_to_the_parts() -> None:
    untouched, model = pair("bart")
    given = encoded(untouched)
    for each in (untouched, model):
        each.model.decoder.layers[1].encoder_attn.layer_idx = 0
    out: list[Tensor] = []
    record = recorded(lambda: out.append(steps(model, given, caches(model))))
    torch.testing.assert_close(out[0], steps(untouched, given, caches(untouched)), rtol=1e-4, atol=1e-4)
    assert any("expected one" in reason for reason in record.reasons)


class TestT5:
    """The bias of the scores, which the first layer makes and hands on."""

    @torch.no_grad()
    def test_another_bias_between_layers_counts(self) -> None:
        untouched, model = pair("t5")
        ours, theirs = [each.encoder.block[1] for each in (model, untouched)]
        hidden, bias = torch.randn(2, 5, 32), torch.randn(1, 4, 5, 5)
        found: list[Any] = []
        assert whole_layers(lambda: found.append(ours(hidden, None, bias))) == ["a layer"]
        expected = theirs(hidden, None, bias)
        torch.testing.assert_close(found[0][0], expected[0], rtol=1e-4, atol=1e-4)
        assert found[0][1] is bias
        assert found[0][2] is expected[2] is None
        record = recorded(lambda: ours(hidden))
        assert any("no bias of the scores" in reason for reason in record.reasons)
        assert [each is None for each in ours(hidden)] == [each is None for each in theirs(hidden)]

    @torch.no_grad()
    def test_a_bias_of_an_encoders_tokens_is_left_to_the_parts(self) -> None:
        untouched, model = pair("t5")
        ours, theirs = [each.decoder.block[1] for each in (model, untouched)]
        hidden, encoder = torch.randn(2, 3, 32), torch.randn(2, 4, 32)
        biases = torch.randn(1, 4, 3, 3), encoder, None, torch.randn(1, 4, 3, 4)
        found: list[Any] = []
        record = recorded(lambda: found.append(ours(hidden, None, *biases)))
        torch.testing.assert_close(found[0][0], theirs(hidden, None, *biases)[0], rtol=1e-4, atol=1e-4)
        assert any("encoder_decoder_position_bias" in reason for reason in record.reasons)

    @torch.no_grad()
    def test_a_method_of_its_own_for_the_bias(self) -> None:
        untouched, model = pair("t5")
        given = encoded(untouched)
        for each in (untouched, model):
            attention = each.decoder.block[0].layer[0].SelfAttention
            attention.relative_attention_bias.weight.mul_(3)
            own = attention.compute_bias
            attention.compute_bias = lambda *args, own=own, **kwargs: own(*args, **kwargs) + 1e3 * torch.rand(1)[0] * 0
        torch.testing.assert_close(
            steps(model, given, caches(model)), steps(untouched, given, caches(untouched)), rtol=1e-4, atol=1e-4
        )

    @torch.no_grad()
    def test_layers_that_make_a_bias_each(self) -> None:
        """UMT5's layers hand nothing on."""
        options = {**FAMILIES["t5"].options, **_SPECIAL}
        untouched, model = [built(lambda: hf.UMT5ForConditionalGeneration(hf.UMT5Config(**options))) for _ in range(2)]
        llmkern.optimize_(model)
        given, out = encoded(untouched, padded=True), []
        called = whole_layers(lambda: out.append(steps(model, given, caches(model))))
        torch.testing.assert_close(out[0], steps(untouched, given, caches(untouched)), rtol=1e-4, atol=1e-4)
        assert called == ["a layer"] * 8

    def test_a_copy_and_training(self) -> None:
        _, model = pair("t5")
        copied = copy.deepcopy(model)
        loss = copied(input_ids=ENCODED, labels=DECODED).loss
        loss.backward()
        assert copied.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad.abs().sum() > 0
