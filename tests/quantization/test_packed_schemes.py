"""`quantize_` to int4 and to int8 in blocks: which layers become what, checkpoints, and the way back."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import llmkern
from llmkern.nn import Int8Embedding, Int8Linear, PackedEmbedding, PackedLinear
from llmkern.quantization import Int4, Int5, Int6, Int8, load_, quantize_
from llmkern.quantization.checkpoint import tensor_names
from llmkern.quantization.formats.blocks import pack_groups, pack_groups_with_feedback
from llmkern.quantization.schemes import scheme_from_dict, scheme_named, scheme_to_dict
from llmkern.quantization.sensitivity import divergences
from llmkern.testing.compare import assert_same_bits

transformers = pytest.importorskip("transformers")

from architectures import round_trip  # noqa: E402  (imports transformers)

IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
SCHEMES = ("int4", "int4-g32", "int5", "int6", "int8-block")


def llama(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes})).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def actions(model) -> dict[str, str]:
    return {row.path: row.action for row in llmkern.report(model).quantization}


@pytest.mark.parametrize(
    ("scheme", "body", "vocabulary", "error"),
    [
        (Int4(bits=None), "int4 g64", "int6 g64", 0.25),
        ("int4-g32", "int4 g32", "int6 g32", 0.2),
        ("int5", "int5 g64", "int6 g64", 0.12),
        ("int6", "int6 g64", "int6 g64", 0.07),
        ("int8-block", "int8-block", "int8 weight-only", 0.02),
    ],
    ids=str,
)
def test_every_layer_gets_the_form_that_it_can_have(scheme, body: str, vocabulary: str, error: float) -> None:
    model = llama()
    expected = logits(model)
    quantize_(model, scheme)
    found = actions(model)
    assert found["model.layers.0.self_attn.q_proj"] == body
    assert found["model.layers.1.mlp.down_proj"] == body.replace("g64", "g128")
    assert found["lm_head"] == found["model.embed_tokens"] == vocabulary
    assert type(model.model.layers[0].mlp.up_proj) is PackedLinear
    in_groups = (PackedLinear, PackedEmbedding) if vocabulary != "int8 weight-only" else (Int8Linear, Int8Embedding)
    assert (type(model.lm_head), type(model.model.embed_tokens)) == in_groups
    assert model.lm_head.codes is model.model.embed_tokens.codes
    assert 0 < (logits(model) - expected).norm() < error * expected.norm()
    report = llmkern.report(model).quantization
    assert all(row.weight_error < 0.12 and (row.output_error or 0) < 0.2 for row in report if row.action == body)
    assert body.split()[0] in str(report).splitlines()[0]
    assert "PackedLinear(in_features=64" in str(model)


def test_a_dict_names_a_scheme_for_each_layer() -> None:
    model = quantize_(
        llama(tie_word_embeddings=False),
        {
            "layers.0.mlp": "int8-block",
            "*.q_proj": Int4(group=32, symmetric=False),
            "k_proj": None,
            "lm_head": Int4(bits=None),
        },
    )
    found = actions(model)
    assert found["model.layers.0.mlp.up_proj"] == "int8-block"
    assert found["model.layers.1.self_attn.q_proj"] == "int4 g32"
    assert model.model.layers[1].self_attn.q_proj.weight_zero is not None
    assert found["lm_head"] == "int4 g64"
    left = {path for path, action in found.items() if action == "left"}
    assert {"model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "model.embed_tokens"} <= left
    asked = model.config.quantization_config["llmkern"]["layers"]
    assert asked["k_proj"] is None
    assert asked["*.q_proj"] == scheme_to_dict(Int4(group=32, symmetric=False))
    with pytest.raises(ValueError, match=r"scheme names no layer that can be quantized \('nothing'\)"):
        quantize_(llama(), {"nothing": "int4"})


def test_a_layer_beyond_the_error_gets_more_bits_and_one_without_blocks_another_form() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 40), nn.Linear(40, 8))
    quantize_(model, Int4(max_error=1e-3))
    rows = {row.path: row for row in llmkern.report(model).quantization}
    assert [rows[path].action for path in "012"] == ["int8-block", "int8-block", "int8 w8a8"]
    assert "its int4 g64 error is " in rows["0"].reason
    assert rows["2"].reason == "its 40 columns are no multiple of 32"


def with_loud_inputs(columns: int, loud: slice, size: float) -> tuple[nn.Sequential, torch.Tensor]:
    """A layer some of whose inputs are so loud that a scale for all rounds the others away, which count as much."""
    torch.manual_seed(0)
    x, model = torch.randn(64, columns), nn.Sequential(nn.Linear(columns, 32))
    x[:, loud] *= size
    with torch.no_grad():
        model[0].weight[:, loud] /= size
    return model, x


def test_int8_has_blocks_where_a_scale_per_token_loses_too_much() -> None:
    """No less accurate than weight-only, which max_error=0 and columns without blocks have."""
    errors: dict[str, torch.Tensor] = {}
    for name, scheme, columns in (
        ("blocks", "int8", 128),
        ("weight-only", Int8(max_error=0), 128),
        ("odd", "int8", 99),
    ):
        model, x = with_loud_inputs(columns, slice(32), 6.0)
        expected = model(x)
        quantize_(model, scheme, calib=[x])
        (row,) = llmkern.report(model).quantization
        assert row.action == ("int8-block" if name == "blocks" else "int8 weight-only")
        assert row.reason == f"its W8A8 error is beyond {'0' if name == 'weight-only' else '2.5'}%"
        errors[name] = (model(x) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors["blocks"].square().mean() <= errors["weight-only"].square().mean()


def test_blocks_that_lose_too_much_are_not_taken() -> None:
    """Where every block of the inputs has a loud channel, a scale for each block helps little."""
    model, x = with_loud_inputs(128, slice(5, None, 32), 10.0)
    quantize_(model, "int8", calib=[x])
    (row,) = llmkern.report(model).quantization
    assert row.action == "int8 weight-only"


def test_a_mixed_checkpoint_comes_back(tmp_path) -> None:
    """int8 by channel, with and without rounded activations, and in blocks: to the bit, and for stock transformers."""
    mixed = {"down_proj": "int8-block", "v_proj": Int8(max_error=0), "*": "int8"}
    model = quantize_(llama(), mixed)
    assert set(actions(model).values()) == {"int8-block", "int8 w8a8", "int8 weight-only"}
    model.save_pretrained(tmp_path)
    loaded = llmkern.load(tmp_path)
    assert_same_bits(logits(loaded), logits(model))
    assert {path: row for path, row in actions(loaded).items() if row != actions(model)[path]} == {}
    pytest.importorskip("compressed_tensors")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (logits(stock) - logits(model)).norm() < 0.02 * logits(model).norm()


def test_importance_moves_the_error_to_where_nobody_looks() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(128)
    importance[::4] = 100.0
    for symmetric in (True, False):
        plain, weighted = (
            (pack_groups(weight, 64, symmetric=symmetric, importance=given).dequantized() - weight).square().sum(0)
            for given in (None, importance)
        )
        assert (weighted * importance).sum() < 0.9 * (plain * importance).sum()
        assert weighted.sum() > plain.sum()
        same = pack_groups(weight, 64, symmetric=symmetric, importance=torch.full((128,), 3.0))
        assert (same.dequantized() - weight).square().sum() <= 1.001 * plain.sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_errors_are_made_up_for_by_later_columns(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(128, 128, generator=generator) + 2  # so that inputs hang together
    x, weight = torch.randn(512, 128, generator=generator) @ mix, torch.randn(32, 128, generator=generator)
    plain = pack_groups(weight, 64, symmetric=symmetric, importance=x.square().mean(0))
    made_up = pack_groups_with_feedback(weight, x.T @ x, 512, 64, symmetric=symmetric)
    errors = [(x @ (each.dequantized() - weight).T).norm() for each in (plain, made_up)]
    assert errors[1] < 0.6 * errors[0]
    few, others = x[:100], x[100:]  # too few inputs to tell 128 columns from each other
    believed = pack_groups_with_feedback(weight, few.T @ few, 100, 64, symmetric=symmetric)
    assert (others @ (believed.dequantized() - weight).T).norm() < (others @ (plain.dequantized() - weight).T).norm()
    # Inputs that have nothing to do with each other: nothing to be made up for.
    alone = pack_groups_with_feedback(weight, torch.eye(128), 512, 64, symmetric=symmetric)
    assert_same_bits(alone.dequantized(), pack_groups(weight, 64, symmetric=symmetric).dequantized())
    model = llama()
    unseen = torch.randint(3, 99, (1, 40), generator=torch.Generator().manual_seed(7))
    expected = model(unseen).logits
    texts = [torch.randint(3, 99, (4, 60), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    gaps = [
        (quantize_(llama(), Int4(group=64, symmetric=symmetric), calib=calib)(unseen).logits - expected).norm()
        for calib in (None, texts)
    ]
    assert gaps[1] < gaps[0]


def test_what_a_layer_costs_is_about_what_it_costs() -> None:
    """The estimate, of one backward pass, beside the divergence of the model with that layer's weight changed."""
    model = llama(initializer_range=0.2)
    ids = torch.randint(3, 99, (40, 60), generator=torch.Generator().manual_seed(5))
    asking = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    layers = {path: module for path, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)}
    changes = {
        module: pack_groups(module.weight, 64).dequantized() - module.weight.detach() for module in layers.values()
    }
    batches = [{"input_ids": part} for part in ids.split(10)]
    found = divergences(model, batches, {module: lambda module=module: changes[module] for module in changes})
    assert asking == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not any(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)
        for path in ("0.self_attn.v_proj", "0.mlp.down_proj", "1.self_attn.o_proj", "1.mlp.gate_proj"):
            module = layers[path]
            module.weight += changes[module]
            got = model(ids).logits.log_softmax(-1)
            module.weight -= changes[module]
            actual = nn.functional.kl_div(got, expected, reduction="none", log_target=True).sum(-1).mean()
            assert 0.6 < found[module] / actual < 1.6, path
    assert divergences(model.model, batches, {module: lambda: torch.zeros(1) for module in changes}) == {}  # no logits


def test_bits_go_to_the_layers_that_cost_the_most() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(8)
        model.model.layers[1].self_attn.o_proj.weight.mul_(8)
    plain, wider = (quantize_(copy.deepcopy(model), Int4(group=64, bits=bits)) for bits in (None, 4.75))
    assert {row.action for row in llmkern.report(plain).quantization if "layers" in row.path} == {"int4 g64"}
    rows = {row.path: row for row in llmkern.report(wider).quantization if "layers" in row.path}
    loud = [path for path in rows if path.endswith(("1.self_attn.v_proj", "1.self_attn.o_proj"))]
    assert {rows[path].action for path in loud} <= {"int6 g32", "int8-block"}
    assert rows[loud[0]].reason == "its rounding costs more than that of others"
    assert min(rows[path].divergence for path in loud) > max(
        row.divergence for path, row in rows.items() if row.action == "int4 g64"
    )
    layers = [module for module in wider.model.modules() if isinstance(module, PackedLinear)]
    bits = sum(8 * module.packed.nbytes for module in layers) / sum(math.prod(module.weight_size) for module in layers)
    assert 4.6 < bits <= 4.75
    assert "KL in int4" in str(llmkern.report(wider).quantization)
    assert (logits(wider) - logits(model)).norm() < (logits(plain) - logits(model)).norm()


def test_a_model_without_gradients_is_quantized_all_the_same() -> None:
    model = llama()
    norm = model.model.norm.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            raise RuntimeError("none here")
        return norm(x)

    model.model.norm.forward = forward
    with pytest.warns(UserWarning, match=r"quantize_: no gradients, so Int4.bits is not used \(none here\)"):
        quantize_(model, "int4")
    assert actions(model)["model.layers.0.self_attn.q_proj"] == "int4 g64"


def test_layers_that_are_given_the_same_tensor_share_its_product() -> None:
    from llmkern.quantization.observe import observe

    model = llama()
    wanted = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    seen = observe(model, wanted, [{"input_ids": IDS}, {"input_ids": IDS[:1]}], wanted)
    attention = model.model.layers[0].self_attn
    assert seen.products[attention.q_proj] is seen.products[attention.v_proj]
    assert len({id(product) for product, _ in seen.products.values()}) == 8
    inputs = []
    attention.o_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
    logits(model)
    with torch.no_grad():
        model(IDS[:1])
    rows = torch.cat(inputs)
    product, count = seen.products[attention.o_proj]
    assert count == len(rows)
    torch.testing.assert_close(product, rows.T @ rows)


@pytest.mark.parametrize("scheme", [*SCHEMES, Int4(group=32, symmetric=False)], ids=str)
def test_saved_and_loaded_is_the_same_model_to_the_bit(scheme: str, tmp_path) -> None:
    model = quantize_(llama(), scheme)
    model.save_pretrained(tmp_path)
    loaded = llmkern.load(tmp_path)
    wanted, got = model.state_dict(), loaded.state_dict()
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        assert value.dtype == got[name].dtype, name
        assert torch.equal(value, got[name]), name
    assert_same_bits(logits(loaded), logits(model))
    assert actions(loaded) == {path: action for path, action in actions(model).items() if action != "left"}
    assert loaded.lm_head.codes is loaded.model.embed_tokens.codes
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert_same_bits(logits(load_(llama(), tmp_path)), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_stock_transformers_loads_it(scheme, dtype: torch.dtype, tmp_path) -> None:
    pytest.importorskip("compressed_tensors")
    model = quantize_(llama().to(dtype), scheme)
    model.save_pretrained(tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    wanted = logits(model).float()
    assert (logits(stock).float() - wanted).norm() < 0.05 * wanted.norm()
    weight = dict(stock.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    own = model.model.layers[0].mlp.up_proj.weight
    assert (weight - own).abs().max() <= torch.finfo(dtype).eps * own.abs().max()


@pytest.mark.parametrize("scheme", ["int4", "int6"])
def test_an_output_head_of_its_own_is_packed(scheme: str, tmp_path) -> None:
    pytest.importorskip("compressed_tensors")
    model = quantize_(llama(tie_word_embeddings=False), scheme)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight_packed" in tensor_names([tmp_path / "model.safetensors"])
    assert_same_bits(logits(llmkern.load(tmp_path)), logits(model))
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (logits(stock) - logits(model)).norm() < 0.05 * logits(model).norm()


def test_a_tied_vocabulary_is_written_once_and_read_with_care(tmp_path) -> None:
    model = quantize_(llama(), "int6")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    assert not {"lm_head.weight", "lm_head.weight_packed"} & tensor_names([file])
    kept = type(model).from_pretrained(tmp_path, quantization_config=llmkern.PackedConfig())
    assert_same_bits(logits(kept), logits(model))
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][3, 3] = 32
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="weight has levels beyond -32 … 31, those of 6 bits"):
        llmkern.load(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bart"])
def test_other_architectures_come_back(name: str) -> None:
    assert round_trip(name, "int4-g32") == "bit for bit"


def test_dequantized_is_what_the_codes_stand_for() -> None:
    model = quantize_(llama(), "int4")
    weights = {
        name: module.weight.clone() for name, module in model.named_modules() if isinstance(module, PackedLinear)
    }
    llmkern.dequantize_(model)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    for name, weight in weights.items():
        assert_same_bits(model.get_submodule(name).weight.detach(), weight)
    assert llmkern.report(model).quantization is None
    assert not hasattr(model.config, "quantization_config")


def test_optimized_it_computes_the_same() -> None:
    model = quantize_(llama(), "int4")
    expected = logits(model)
    llmkern.optimize_(model)
    assert (logits(model) - expected).norm() < 0.02 * expected.norm()


def test_from_pretrained_quantizes(tmp_path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=llmkern.QuantConfig("int4", skip=["q_proj"]))
    quantize_(model, "int4", skip=["q_proj"])
    assert_same_bits(list(loaded.state_dict().values()), list(model.state_dict().values()))
    assert loaded.config.quantization_config == model.config.quantization_config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_are_trained_beside_it_and_merged_exactly(options) -> None:
    peft = pytest.importorskip("peft")
    model = quantize_(llama(), "int4")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
    model = peft.get_peft_model(model, config)
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.eval()
    expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    assert type(merged.model.layers[0].self_attn.k_proj) is PackedLinear
    assert (logits(merged) - expected).norm() < 0.05 * expected.norm()
    quantize_(merged, "int4")
    assert type(merged.model.layers[0].self_attn.q_proj) is PackedLinear


def test_schemes_are_values_that_json_carries() -> None:
    for scheme in (
        Int4(group=64, symmetric=False),
        Int4(bits=None),
        Int5(group=32, max_error=0.1),
        Int6(smooth=False),
        Int8(block=32),
        scheme_named({"a": "int4", "b*": None}),
    ):
        assert scheme_from_dict(json.loads(json.dumps(scheme_to_dict(scheme)))) == scheme
    assert scheme_named("int8-block") == Int8(block=32)
    for wrong, message in (
        (lambda: Int4(group=48), "Int4: group is 48, expected 32 or 64 or 128"),
        (lambda: Int6(group=16), "Int6: group is 16, expected 32 or 64 or 128"),
        (lambda: Int4(bits=3), "Int4: bits is 3, expected None or a number from 4 to 9"),
        (lambda: Int4(max_error=-1), "Int4: max_error is -1, expected a number that is 0 or more"),
        (lambda: Int8(block=64), "Int8: block is 64, expected None or 32"),
        (lambda: scheme_named({}), "scheme is {}, expected schemes by name of a layer"),
        (lambda: scheme_named({"a": {"b": "int4"}}), "the scheme of a layer is a dict"),
        (
            lambda: scheme_named("int2"),
            "scheme is 'int2', expected 'int8', 'int8-block', 'int4', 'int4-g32', 'int5', 'int6', llmkern",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            wrong()


def test_what_has_no_form_in_a_checkpoint_is_said_and_a_failure_changes_nothing(tmp_path, unchanged) -> None:
    model = quantize_(llama(), "int4")
    layer = model.model.layers[0].mlp.up_proj
    layer.register_buffer("weight_offset", torch.zeros_like(layer.weight_scale))
    with pytest.raises(ValueError, match="int4 g64: its blocks have offsets"):
        model.save_pretrained(tmp_path)
    floating = llama()
    with torch.no_grad():
        floating.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    check = unchanged(floating)
    with pytest.raises(ValueError, match="int4: weight has NaN or infinite values"):
        quantize_(floating, "int4")
    check()
