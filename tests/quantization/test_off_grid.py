"""The off-grid model computes the same, and its weights are no longer those of four bits; how models differ."""

from __future__ import annotations

import math

import pytest
import torch

from llmkern.quantization.formats.blocks import pack_groups
from llmkern.testing.off_grid import rescale_
from llmkern.testing.perplexity import divergence, perplexity

transformers = pytest.importorskip("transformers")


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    made = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # weights on a grid of four bits
        for layer in made.model.layers:
            for module in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                grid = torch.randint(-8, 8, module.weight.shape).float()
                grid[:, ::32] = -8
                module.weight.copy_(grid * 0.0625)
    return made


@torch.no_grad()
def test_the_function_is_the_same_and_the_weights_are_off_the_grid(model) -> None:
    ids = torch.randint(50, (2, 40))
    before = model(ids).logits
    projections = [layer.mlp.down_proj for layer in model.model.layers]
    assert all(pack_groups(each.weight).dequantized().equal(each.weight) for each in projections)
    norm = model.model.layers[0].input_layernorm.weight.clone()
    assert rescale_(model) is model
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    change = model.model.layers[0].input_layernorm.weight / norm
    assert 0.9 <= float(change.min()) < 0.95 < 1.05 < float(change.max()) <= 1.1
    for each in projections:
        assert (pack_groups(each.weight).dequantized() - each.weight).norm() > 0.02 * each.weight.norm()


def test_divergence_is_what_its_formula_says(model) -> None:
    other = transformers.LlamaForCausalLM(model.config).eval()
    ids = torch.randint(50, (70,))
    found = divergence(model, other, ids, context=32)
    with torch.no_grad():
        p, q = (each(ids[:64].view(2, 32)).logits[:, :-1].double().softmax(-1) for each in (other, model))
    kl = (p * (p / q).log()).sum(-1).flatten()
    assert math.isclose(found.mean, float(kl.mean()), rel_tol=1e-5)
    assert math.isclose(found.p999, float(kl.quantile(0.999)), rel_tol=1e-5)
    assert found.same_top == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert math.isclose(found.perplexity, perplexity(model, ids, context=32), rel_tol=1e-6)
    same = divergence(model, model, ids, context=32)
    assert (same.mean, same.p999, same.same_top) == (0, 0, 1)
    with pytest.raises(ValueError, match="divergence: context is 1, expected at least 2"):
        divergence(model, other, ids, context=1)
