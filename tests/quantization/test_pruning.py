"""`prune_`: what matters least goes, matrices are smaller, and stock transformers loads the result."""

from __future__ import annotations

import pytest
import torch

import llmkern
from llmkern.quantization.pruning import prune_
from llmkern.testing.compare import assert_same_bits

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def test_what_contributes_nothing_goes_and_nothing_else_changes() -> None:
    model = llama()
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight[:, i : 96 + i : 3] = 0  # 32 channels
            layer.self_attn.o_proj.weight[:, 16:48] = 0  # the query heads of key-value heads 1 and 2
        model.model.layers[2].mlp.down_proj.weight.zero_()
        model.model.layers[2].self_attn.o_proj.weight.zero_()
    expected = logits(model)
    report = prune_(model, mlp=0.25, heads=0.5, layers=0.25)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    assert [row.path for row in report if row.what == "layer"] == ["model.layers.2"]
    first = model.model.layers[0]
    assert first.mlp.gate_proj.weight.shape == first.mlp.up_proj.weight.shape == (96, 64)
    assert (first.mlp.down_proj.weight.shape, model.config.intermediate_size) == ((64, 96), 96)
    assert (first.self_attn.q_proj.out_features, first.self_attn.k_proj.out_features) == (32, 16)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (4, 2, 8)
    assert all(row.share < 1e-6 for row in report)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    now = sum(parameter.numel() for parameter in model.parameters())
    assert report.parameters_after == now < report.parameters_before
    assert "32 of 128" in str(report)


@pytest.mark.parametrize(
    "shares", [{"mlp": 0.3}, {"heads": 0.5}, {"layers": 0.5}, {"mlp": 0.5, "heads": 0.45}], ids=str
)
def test_stock_transformers_loads_it_and_the_rest_follows(shares, tmp_path) -> None:
    model = llama()
    prune_(model, **shares, calib=[IDS])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_bits(logits(stock), expected)
    llmkern.optimize_(model)
    assert (logits(model) - expected).norm() < 1e-4 * expected.norm()
    answer = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert_same_bits(answer, stock.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0))
    llmkern.quantize_(stock, "int8-block")
    assert (logits(stock) - expected).norm() < 0.1 * expected.norm()


def test_the_least_important_channels_go_first() -> None:
    model, loud = llama(), torch.arange(0, 128, 2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, loud] *= 100
            layer.mlp.up_proj.weight[loud] /= 10
    before = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    report = prune_(model, mlp=0.5)
    assert_same_bits(model.model.layers[1].mlp.up_proj.weight.detach(), before[loud])
    assert all(0 < row.share < 0.2 for row in report)


def test_bad_input(unchanged) -> None:
    model = llama()
    check = unchanged(model)
    for arguments, message in (
        ({"mlp": 1.0}, "mlp is 1.0, expected a share from 0 to below 1"),
        ({"heads": "half"}, "heads is 'half', expected a share"),
        ({"heads": 0.25}, "leaves 3 of 4 key-value heads .* hidden size 64 are possible: 1, 2"),
        ({}, "nothing is to be removed"),
        ({"mlp": 0.5, "calib": []}, "calib is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_(model, **arguments)
    with pytest.raises(TypeError, match="model is a Linear, expected a language model"):
        prune_(torch.nn.Linear(4, 4), mlp=0.5)
    check()
    with pytest.raises(ValueError, match="model is optimized, expected one before optimize_"), llmkern.patched(model):
        prune_(model, mlp=0.5)
    check()
    llmkern.quantize_(model)
    with pytest.raises(
        ValueError, match=r"model.layers.0.mlp.gate_proj is a Int8Linear, expected nn.Linear \(prune bef"
    ):
        prune_(model, mlp=0.5)
