"""GPTQ and AWQ checkpoints: loaded with their codes, and saved as compressed-tensors'."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmkern
from llmkern.config import settings
from llmkern.nn import PackedLinear
from llmkern.packed import PackedWeight
from llmkern.quantization.formats._bits import words_of
from llmkern.quantization.formats.blocks import pack_groups
from llmkern.quantization.formats.packed_int32 import AWQ_ORDER
from llmkern.testing.compare import assert_same_bits

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model) -> Tensor:
    return model(IDS).logits


def parts(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [n, k], scales and zero points [n, groups]."""
    codes, scale, zero = (packed.rows(name) for name in ("codes", "scale", "zero"))
    return codes, scale, torch.full_like(scale, 8, dtype=torch.uint8) if zero is None else zero


def gptq_tensors(packed: PackedWeight, version: int, order: Tensor | None) -> dict[str, Tensor]:
    codes, scale, zero = parts(packed)
    g_idx = torch.arange(packed.k) // (packed.k // scale.shape[1])
    if order is not None:  # columns as the layer has them
        codes, g_idx = codes[:, order.argsort()], g_idx[order.argsort()]
    return {
        "qweight": words_of(codes, 4).T.contiguous(),
        "qzeros": words_of((zero.T - (2 - version)).contiguous(), 4),
        "scales": scale.T.contiguous(),
        "g_idx": g_idx.int(),
    }


def awq_tensors(packed: PackedWeight, *_: Any) -> dict[str, Tensor]:
    codes, scale, zero = parts(packed)

    def words(rows: Tensor) -> Tensor:
        spread = torch.empty_like(rows.unflatten(1, (-1, 8)))
        spread[..., AWQ_ORDER] = rows.unflatten(1, (-1, 8))
        return words_of(spread.flatten(1), 4)

    return {
        "qweight": words(codes.T.contiguous()),
        "qzeros": words(zero.T.contiguous()),
        "scales": scale.T.contiguous(),
    }


def checkpoint(folder: Path, config: dict[str, Any], make, *, symmetric: bool, biases: bool = False, order=None):
    """A folder as those programs write it, and the floating-point model that it stands for."""
    from safetensors.torch import load_file, save_file

    model = llama()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for path, module in model.model.layers.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        own = None if order is None else torch.randperm(module.in_features, generator=torch.Generator().manual_seed(1))
        weight = module.weight.detach()
        packed = pack_groups(weight if own is None else weight[:, own], 32, symmetric=symmetric)
        if own is not None:  # within a group in order, as their readers take them
            own = own.unflatten(0, (-1, 32)).sort(-1).values.flatten()
            packed = pack_groups(weight[:, own], 32, symmetric=symmetric)
        if packed.zero is not None:
            packed.zero.clamp_(min=1)
        with torch.no_grad():
            values = packed.dequantized()
            module.weight.copy_(values if own is None else values[:, own.argsort()])
        del tensors[f"model.layers.{path}.weight"]
        made = make(packed, config.get("version_number", 1), own)
        if biases:
            made["bias"] = torch.zeros(packed.n, dtype=torch.float16)
        tensors |= {f"model.layers.{path}.{name}": tensor.clone() for name, tensor in made.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = {name: value for name, value in config.items() if name != "version_number"}
    (folder / "config.json").write_text(json.dumps(described))
    return model


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize(
    ("config", "make", "options"),
    [
        (GPTQ | {"sym": True}, gptq_tensors, {"symmetric": True, "biases": True}),
        (GPTQ | {"checkpoint_format": "gptq"}, gptq_tensors, {"symmetric": False}),
        (GPTQ | {"checkpoint_format": "gptq_v2", "version_number": 2}, gptq_tensors, {"symmetric": False}),
        (GPTQ | {"desc_act": True}, gptq_tensors, {"symmetric": False, "order": "act"}),
        (AWQ, awq_tensors, {"symmetric": False}),
    ],
    ids=["gptq-symmetric", "gptq", "gptq_v2", "gptq-act-order", "awq"],
)
def test_codes_are_kept_and_mean_the_same(config, make, options, tmp_path: Path) -> None:
    expected = checkpoint(tmp_path, config, make, **options)
    model = llmkern.load(tmp_path, dtype=torch.float32)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert len(layers) == 14
    assert {module.kind for module in layers.values()} == {"int4 g32"}
    for path, module in layers.items():
        assert_same_bits(module.weight.clone(), expected.get_submodule(path).weight.detach())
        assert (module.permutation is not None) == ("order" in options)
        assert module.bias is None
    wanted = logits(expected)
    assert (logits(model) - wanted).norm() < 0.03 * wanted.norm()
    if "order" in options:
        with pytest.raises(ValueError, match="its groups are not of neighbouring columns"):
            model.save_pretrained(tmp_path / "again")
        return
    # Saved, it is compressed-tensors', with the same weights.
    model.save_pretrained(tmp_path / "again")
    again = llmkern.load(tmp_path / "again")
    assert_same_bits(logits(again), logits(model))
    if not options["symmetric"]:
        return  # stock transformers 5.23 expects zero points that are not packed, which nobody writes
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert (logits(stock) - wanted).norm() < 1e-4 * wanted.norm()


def test_zero_points_of_the_other_version_are_seen(tmp_path: Path) -> None:
    checkpoint(tmp_path, GPTQ | {"sym": True, "version_number": 2}, gptq_tensors, symmetric=True)
    with pytest.raises(ValueError, match=r"load: .*q_proj: its qzeros stand for 9, expected 8 .*the other version"):
        llmkern.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "its bits are 3, expected 4 or 8"),
        ({"checkpoint_format": "marlin"}, "its checkpoint_format is 'marlin', expected 'gptq' or 'gptq_v2'"),
        ({"group_size": 48}, "has 64 columns, and groups of 48 in the checkpoint, which do not divide them"),
        ({"group_size": 64}, "g_idx does not have 64 columns for each of 1 groups"),
        ({"quant_method": "hqq"}, "does not describe a quantized model"),
        ({"quant_method": "awq", "version": "gemv"}, "its version is 'gemv', expected 'gemm'"),
    ],
)
def test_what_cannot_be_read_is_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, GPTQ, gptq_tensors, symmetric=False)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        llmkern.load(tmp_path)
    assert "\n" not in str(caught.value)


def stock(folder: Path, **options: Any):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def same_tensors(got, wanted) -> None:
    states = got.state_dict(), wanted.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        assert torch.equal(states[0][name], value), name


@pytest.mark.parametrize(
    ("config", "make"),
    [(GPTQ | {"desc_act": True}, gptq_tensors), (AWQ, awq_tensors)],
    ids=["gptq-act-order", "awq"],
)
def test_stock_from_pretrained_keeps_codes(config, make, tmp_path: Path) -> None:
    """With a config, with a setting, and on its own where transformers would ask for a package that is not there."""
    checkpoint(tmp_path, config, make, symmetric=False, order="act" if "desc_act" in config else None)
    expected = llmkern.load(tmp_path, dtype=torch.float32)
    same_tensors(stock(tmp_path, quantization_config=llmkern.PackedConfig()), expected)
    if importlib.util.find_spec("gptqmodel") is not None:
        return
    model = stock(tmp_path)
    same_tensors(model, expected)
    assert type(model.model.layers[0].self_attn.q_proj) is PackedLinear
    described = [getattr(each.config, "quantization_config", None) for each in (model, expected)]
    assert described[0] == described[1]  # none of groups in another order: they cannot be saved
    llmkern.optimize_(model)
    assert (logits(model) - logits(expected)).norm() < 0.02 * logits(expected).norm()


def test_compressed_tensors_are_kept_where_it_is_asked_for(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("compressed_tensors")
    model = llmkern.quantize_(llama(), {"mlp": "int4-g32", "self_attn": "int8"})
    model.save_pretrained(tmp_path)
    same_tensors(stock(tmp_path, quantization_config=llmkern.PackedConfig()), model)
    untouched = stock(tmp_path)
    logits(untouched)
    assert not any(isinstance(module, PackedLinear) for module in untouched.modules())
    monkeypatch.setattr(settings, "keep_packed", True)
    same_tensors(stock(tmp_path), model)
    # What llmkern does not read is transformers' as before.
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not any(isinstance(module, PackedLinear) for module in stock(tmp_path).modules())
    with pytest.raises(ValueError, match=r"from_pretrained: .* reads: its kv_cache_scheme is set, expected none"):
        stock(tmp_path, quantization_config=llmkern.PackedConfig())


def test_what_cannot_be_kept_is_said(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    llama().save_pretrained(tmp_path / "floating")
    with pytest.raises(ValueError, match=r"^from_pretrained: PackedConfig keeps .* this one is in floating point"):
        stock(tmp_path / "floating", quantization_config=llmkern.PackedConfig())
    checkpoint(tmp_path, GPTQ, gptq_tensors, symmetric=False)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"from_pretrained: .* lacks model.layers.1.mlp.up_proj.scales$"):
        stock(tmp_path, quantization_config=llmkern.PackedConfig())
