"""What happens between two tokens to weights of which the layers together have views or codes, or to their dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_models import (
    APART,
    DECODERS,
    PROMPT,
    STEPS,
    TOGETHER,
    TOKENS,
    Sequence,
    built,
    layers_alone,
    named,
    needs_kernels,
    on_each_layer,
    optimized,
    whole_layers,
)
from torch import Tensor, nn

import llmkern

pytestmark = [pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning"), needs_kernels]


def give_biases(model: Any) -> None:
    """To the linear layers of the decoder's layers that have none, as Phi3's."""
    for layer in model.model.layers:
        for linear in [child for child in layer.modules() if isinstance(child, nn.Linear) and child.bias is None]:
            linear.bias = nn.Parameter(torch.linspace(-1, 1, linear.out_features))


def bits_of_each_layer_alone(model: Any, ours: Any, alone: Any, tokens: Tensor) -> list[str]:
    """Compares the layers together, where they are, with one after the other; what was called."""
    out: list[Tensor] = []
    called = whole_layers(lambda: out.append(model(tokens, past_key_values=ours).logits))
    with layers_alone():
        assert torch.equal(out[0], model(tokens, past_key_values=alone).logits)
    return called


def packed_weights(layer: Any) -> None:
    for packed in (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj):
        weight = packed._parameters["weight"]  # an int8 layer's codes
        weight.data = -weight


def packed_biases(layer: Any) -> None:
    for packed in (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj):
        packed.bias.data = -packed.bias


def packed_scales(layer: Any) -> None:
    for packed in (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj):
        packed.weight_scale.data = 2 * packed.weight_scale


def packed_in_place(layer: Any) -> None:
    layer.mlp.gate_up_proj._parameters["weight"].neg_()


def other_scheme(layer: Any) -> None:
    layer.mlp.down_proj.scheme = "w8a8" if layer.mlp.down_proj.scheme == "w8a16" else "w8a16"


def new_scale(layer: Any) -> None:
    layer.self_attn.o_proj.weight_scale = 2 * layer.self_attn.o_proj.weight_scale


PACKED = (packed_weights, packed_biases, packed_in_place)


@on_each_layer
@pytest.mark.parametrize(
    ("name", "quantized", "change"),
    [
        *[("phi3", quantized, change) for quantized in (False, True) for change in PACKED],
        ("phi3", True, packed_scales),
        *[(name, True, change) for name in ("phi3", "llama") for change in (other_scheme, new_scale)],
    ],
)
@torch.no_grad()
def test_packed_and_int8_weights_change(name, quantized, change, index) -> None:
    model = built(DECODERS[name])
    give_biases(model)
    if quantized:
        llmkern.quantize_(model)
    llmkern.optimize_(model)
    caches = [llmkern.KVCache(model.config) for _ in range(2)]
    assert bits_of_each_layer_alone(model, *caches, PROMPT) == TOGETHER
    assert bits_of_each_layer_alone(model, *caches, STEPS[0]) == TOGETHER
    before = model(TOKENS).logits
    change(model.model.layers[index])
    assert bits_of_each_layer_alone(model, *caches, STEPS[1]) == (TOGETHER if change is packed_in_place else APART)
    assert bits_of_each_layer_alone(model, *caches, STEPS[2]) == TOGETHER
    assert not torch.equal(model(TOKENS).logits, before)


def packed_layout(layer: Any) -> None:
    weight = layer.mlp.gate_up_proj.weight
    weight.data = weight.data.view(*reversed(weight.shape)).t()  # where it was, in another order


def fewer_packed_rows(layer: Any) -> None:
    layer.mlp.gate_up_proj.weight.data = layer.mlp.gate_up_proj.weight[:40]
    layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight[:, :20]


@on_each_layer
@named(packed_layout, fewer_packed_rows)
@torch.no_grad()
def test_packed_weights_in_another_layout(change, index) -> None:
    sequence = Sequence(built(DECODERS["phi3"]), optimized(DECODERS["phi3"]))
    for tokens in (PROMPT, STEPS[0]):
        assert sequence.give(tokens) == TOGETHER
    for each in sequence.models:
        change(each.model.layers[index])
    transposed = change is packed_layout  # which the op takes, once weights are looked up again: with several tokens
    for tokens in STEPS[1:]:
        served = TOGETHER if len(tokens[0]) > 1 else APART
        assert sequence.give(tokens) == (served if transposed else APART[:1])
    assert Sequence(*sequence.models).give(PROMPT) == (TOGETHER if transposed else APART[:1])


@pytest.mark.parametrize("name", ["llama", "phi3"])
@torch.no_grad()
def test_the_model_in_another_dtype(name) -> None:
    untouched, model = built(DECODERS[name]), optimized(DECODERS[name])
    assert Sequence(untouched, model).give(TOKENS) == TOGETHER
    for dtype in (torch.bfloat16, torch.float16, torch.float32):  # each time less of the weights is left
        for each in (untouched, model):
            each.to(dtype)
        caches = [llmkern.KVCache(model.config) for _ in range(2)]
        for tokens in (PROMPT, *STEPS):
            assert bits_of_each_layer_alone(model, *caches, tokens) == TOGETHER
    sequence = Sequence(untouched, model)
    assert sequence.give(PROMPT) == TOGETHER
    for each in (untouched, model):
        each.to(torch.bfloat16).to(torch.float32)
    sequence.give(STEPS[0])
    for each in (untouched, model):
        each.to(torch.float64)
    torch.testing.assert_close(model(TOKENS).logits, untouched(TOKENS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_norm_in_another_dtype() -> None:
    sequence = Sequence(built(DECODERS["llama"]), optimized(DECODERS["llama"]))
    assert sequence.give(PROMPT) == TOGETHER
    for each in sequence.models:
        weight = each.model.layers[1].post_attention_layernorm.weight
        weight.data = (2 * weight).bfloat16()
    for tokens in STEPS:
        sequence.give(tokens)
    Sequence(*sequence.models).give(PROMPT)
