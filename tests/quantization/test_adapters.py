"""Other libraries on int8 layers: adapters that read the weight, merge into it, or train a copy of the layer."""

from __future__ import annotations

import copy

import pytest
import torch

import llmkern
from llmkern.nn import Int8Linear
from llmkern.quantization import quantize_
from llmkern.testing.compare import assert_same_bits

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
ADAPTERS = {
    "lora": peft.LoraConfig(**LORA),
    "dora": peft.LoraConfig(**LORA, use_dora=True),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "boft": peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4, init_weights=False),
    "oft": peft.OFTConfig(target_modules=["q_proj"], r=4, oft_block_size=0, init_weights=False),
    "hra": peft.HRAConfig(target_modules=["q_proj"], init_weights=False),
    "road": peft.RoadConfig(target_modules=["q_proj"], init_weights=False),
    "loha": peft.LoHaConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "lokr": peft.LoKrConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"], init_weights=False),
    "fourier": peft.FourierFTConfig(n_frequency=50, target_modules=["q_proj"], init_weights=True),
    "tokens": peft.TrainableTokensConfig(token_indices=[5, 6, 7], target_modules=["embed_tokens"], init_weights=False),
    "lora-on-embeddings": peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False),
    "lora-and-a-trained-head": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def base():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_on_an_int8_model_means_what_it_was_trained_to_mean(name: str, tmp_path) -> None:
    torch.manual_seed(3)
    trained = peft.get_peft_model(base(), copy.deepcopy(ADAPTERS[name])).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    wanted = logits(trained)
    trained.save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(quantize_(base()), tmp_path).eval()
    assert relative(logits(model), wanted) < 0.12
    merged = model.merge_and_unload()
    assert relative(logits(merged), wanted) < 0.12


def lora_on(model):
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(**LORA)).eval()


@pytest.mark.filterwarnings("ignore:llmkern")
def test_lora_merges_exactly_and_quantizes_again_with_its_error() -> None:
    model = lora_on(quantize_(base()))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    exact = layer.base_layer.dequantized_weight() + layer.get_delta_weight("default")
    merged = model.merge_and_unload()
    q_proj = merged.model.layers[0].self_attn.q_proj
    assert type(q_proj) is torch.nn.Linear
    assert_same_bits(q_proj.weight.detach(), exact)
    left = {row.path: row.reason for row in llmkern.report(merged).quantization.left}
    assert set(left) == {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    assert "written or replaced since" in left["model.layers.0.self_attn.q_proj"]
    floating = logits(merged)
    quantize_(merged)
    report = llmkern.report(merged).quantization
    (row,) = [row for row in report if row.path == "model.layers.0.self_attn.q_proj"]
    assert not report.left
    assert 0 < row.weight_error < 0.02
    assert row.output_error is not None
    assert type(merged.model.layers[0].self_attn.q_proj) is Int8Linear
    assert relative(logits(merged), floating) < 0.1


@pytest.mark.filterwarnings("ignore:llmkern")
@pytest.mark.parametrize("again", [False, True], ids=["merged", "merged-and-quantized-again"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_merged_model_is_saved_as_what_it_is(kind: str, again: bool, tmp_path) -> None:
    """GPT-2's layers are Conv1D, and its head is tied."""
    if kind == "llama":
        plain, layers = base(), ["q_proj"]
    else:
        config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        plain, layers = transformers.GPT2LMHeadModel(config).eval(), ["c_attn", "c_proj"]
    adapter = peft.LoraConfig(r=4, target_modules=layers, init_lora_weights=False)
    model = peft.get_peft_model(quantize_(plain), adapter).eval().merge_and_unload()
    assert model.config.tie_word_embeddings == (kind == "gpt2")
    if again:
        quantize_(model)
    model.save_pretrained(tmp_path)
    loaded = llmkern.load(tmp_path)
    wanted, got = model.state_dict(), loaded.state_dict()
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        assert torch.equal(value, got[name]), name
    back = llmkern.dequantize_(copy.deepcopy(model))
    assert {type(module).__name__ for module in back.modules()} == {
        type(module).__name__ for module in plain_classes(kind)
    }
    back.save_pretrained(tmp_path / "back")
    stock = type(back).from_pretrained(tmp_path / "back")
    assert_same_bits(logits(stock), logits(back))


def plain_classes(kind: str):
    if kind == "llama":
        return base().modules()
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1)).modules()


@pytest.mark.filterwarnings("ignore:llmkern")
def test_an_unmerged_adapter_leaves_what_the_codes_stand_for() -> None:
    model = lora_on(quantize_(base()))
    before = logits(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    weight = layer.base_layer.dequantized_weight()
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight.detach(), weight, rtol=1e-5, atol=1e-6)
    assert relative(logits(model), before) < 0.1


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_an_adapter_saves_is_trained() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(quantize_(base()), config)
    model(input_ids=IDS, labels=IDS).loss.backward()
    head = model.base_model.model.lm_head
    assert head.modules_to_save["default"].weight.grad.abs().sum() > 0
    assert type(head.original_module) is Int8Linear


@pytest.mark.filterwarnings("ignore")
def test_a_block_that_an_adapter_saves_is_trained() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"])
    model = peft.get_peft_model(quantize_(base()), config)
    model(input_ids=IDS, labels=IDS).loss.backward()
    mlp = model.base_model.model.model.layers[0].mlp
    assert mlp.modules_to_save["default"].up_proj.weight.grad.abs().sum() > 0
    assert type(mlp.original_module.up_proj) is Int8Linear


def test_the_report_follows_peft_s_wrapping() -> None:
    report = llmkern.report(lora_on(quantize_(base()))).quantization
    assert not report.left
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer" in {row.path for row in report}
