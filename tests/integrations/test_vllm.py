"""vLLM's plugin, without vLLM: against the interfaces that were recorded from it (`make vllm` runs the engine)."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm_interfaces import LAYERS, RECORDED, parameters, stand_in

from llmkern import ops
from llmkern.integrations import vllm as plugin
from llmkern.nn import Int8Linear
from llmkern.quantization.formats.blocks import pack_groups, pack_int8_blocks
from llmkern.quantization.formats.packed_int32 import write_pack_quantized

PARTS = ("weights", "embedding", *plugin._PARTS)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Stand-ins for vLLM's modules, with the plugin registered."""
    for name, module in stand_in().items():
        monkeypatch.setitem(sys.modules, name, module)
    plugin.register()
    yield sys.modules["vllm"]
    for part in PARTS:
        sys.modules.pop(f"{plugin.__name__}.{part}", None)


def part(name: str) -> Any:
    return importlib.import_module(f"{plugin.__name__}.{name}")


def config_of(vllm: Any, method: str) -> Any:
    return vllm.model_executor.layers.quantization.configs[method]


def layer_of(vllm: Any, kind: str, config: Any, prefix: str, **sizes: Any) -> Any:
    """Make a layer as vLLM does: it asks the config for a method, which creates the parameters."""
    home = f"{LAYERS}.{'linear' if kind == 'LinearBase' else 'vocab_parallel_embedding'}"
    layer = getattr(sys.modules[home], kind)()
    layer.quant_method = config.get_quant_method(layer, prefix)
    if sizes:
        layer.quant_method.create_weights(layer, weight_loader=None, **sizes)
    return layer


def floating(vllm: Any, kind: str, config: Any, weight: Tensor) -> Any:
    layer = layer_of(vllm, kind, config, "a.layer")
    layer.register_parameter("weight", nn.Parameter(weight.clone(), requires_grad=False))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def test_it_is_inert_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # type: ignore[arg-type]
    assert importlib.reload(plugin).engine_options("int8")["quantization"] == "llmkern_int8"


def test_another_release_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.33.1"))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert caplog.messages == [
        f"llmkern's plugin is made for vLLM {plugin.VERSION} and stays out of vLLM 0.33.1, which works without it"
    ]


def test_the_release_is_the_one_that_was_recorded() -> None:
    assert json.loads(RECORDED.read_text())["vllm"].startswith(f"{plugin.VERSION}.")


def test_registering_twice_changes_nothing(vllm: Any) -> None:
    configs = dict(vllm.model_executor.layers.quantization.configs)
    plugin.register()
    assert vllm.model_executor.layers.quantization.configs == configs
    assert set(configs) == {*plugin.METHODS, "llmkern"}


def test_methods_have_the_parameters_that_vllm_passes(vllm: Any) -> None:
    recorded = json.loads(RECORDED.read_text())["classes"]
    nothing: dict[str, Any] = {"methods": {}}
    seen = 0
    for name in PARTS:
        for cls in vars(part(name)).values():
            if not isinstance(cls, type) or cls.__module__ != f"{plugin.__name__}.{name}":
                continue
            names = [f"{base.__module__}:{base.__name__}" for base in cls.__mro__[1:]]
            if name == "embedding":  # stands in for a class that it does not inherit from
                names.insert(0, f"{LAYERS}.vocab_parallel_embedding:UnquantizedEmbeddingMethod")
            bases = [recorded.get(base, nothing) for base in names]
            for method, bare in vars(cls).items():
                described = next((base["methods"][method] for base in bases if method in base["methods"]), None)
                if described is not None:
                    own = parameters(getattr(bare, "__func__", bare))
                    assert own[isinstance(bare, classmethod) :] == described, f"{cls.__name__}.{method}"
                    seen += 1
            assert name == "embedding" or getattr(cls, "__abstractmethods__", frozenset()) == frozenset()
    assert seen > 20


def test_engine_options_name_what_is_registered(vllm: Any) -> None:
    options = plugin.engine_options("int8-block")
    assert options["quantization"] in vllm.model_executor.layers.quantization.configs
    priorities = options["kernel_config"]["ir_op_priority"]
    assert set(priorities) == set(json.loads(RECORDED.read_text())["ir_ops"])
    for op, providers in priorities.items():
        assert providers[0] in getattr(vllm.ir.ops, op).impls
    assert "quantization" not in plugin.engine_options()
    with pytest.raises(ValueError, match="quantization is 'int3', expected 'int8' or .* or 'checkpoint'"):
        plugin.engine_options("int3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_and_activations_are_the_ops(vllm: Any, dtype: torch.dtype) -> None:
    x, residual = torch.randn(3, 64).to(dtype), torch.randn(3, 64).to(dtype)
    weight = torch.randn(64).to(dtype)
    norms = vllm.ir.ops.rms_norm.impls["llmkern"], vllm.ir.ops.fused_add_rms_norm.impls["llmkern"]
    assert torch.equal(norms[0](x, weight, 1e-5), ops.rms_norm(x, weight, 1e-5))
    for found, expected in zip(
        norms[1](x, residual, None, 1e-5), ops.add_rms_norm(x, residual, None, 1e-5), strict=True
    ):
        assert torch.equal(found, expected)
    assert not part("norms")._takes_rms_norm(x, weight, 1e-5, 32)
    assert not part("norms")._takes_add_rms_norm(x, residual.double(), weight, 1e-5)
    made = vllm.model_executor.custom_op.op_registry_oot["SiluAndMul"]
    assert torch.equal(made.forward_cpu(None, x), ops.swiglu(x[:, :32], x[:, 32:]))


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 40)], ids=["", "bias"])
@pytest.mark.parametrize(("method", "columns"), [*((method, 96) for method in plugin.METHODS), ("llmkern_int4", 40)])
def test_a_floating_point_layer_is_quantized_once_loaded(
    vllm: Any, method: str, columns: int, bias: Tensor | None
) -> None:
    config = config_of(vllm, method)()
    assert config.get_name() == method
    weight, x = torch.randn(40, columns), torch.randn(5, columns)
    layer = floating(vllm, "LinearBase", config, weight)
    if columns % 32 or method == "llmkern_int8":
        expected = ops.int8_linear(x, *ops.quantize_int8(weight), bias)
    else:
        group = 32  # the largest of 32, 64 and 128 that divides 96
        bits = int(method.removeprefix("llmkern_int")[0])
        packed = pack_int8_blocks(weight) if bits == 8 else pack_groups(weight, group, bits=bits)
        expected = ops.quantized_linear(x, packed.codes, packed.scale, bias=bias, code=packed.code, n=packed.n)
    assert torch.equal(layer.quant_method.apply(layer, x, bias), expected)
    assert all(not p.is_floating_point() or p.numel() < weight.numel() / 8 for p in layer.parameters())


def test_an_embedding_and_the_head_that_is_tied_to_it_share_their_codes(vllm: Any) -> None:
    config = config_of(vllm, "llmkern_int4")()
    weight = torch.randn(64, 32).bfloat16()
    embedding, head = (layer_of(vllm, "VocabParallelEmbedding", config, name) for name in ("embed", "lm_head"))
    embedding.weight = head.weight = nn.Parameter(weight, requires_grad=False)
    for layer in (embedding, head):
        layer.quant_method.process_weights_after_loading(layer)
    codes, scale = ops.quantize_int8(weight)
    ids = torch.tensor([[3, 1], [0, 63]])
    assert torch.equal(embedding.quant_method.embedding(embedding, ids), (codes * scale).bfloat16()[ids])
    x = torch.randn(7, 32).bfloat16()
    assert torch.equal(head.quant_method.apply(head, x), ops.int8_linear(x, codes, scale, scheme="w8a16"))
    assert embedding.weight.data_ptr() == head.weight.data_ptr()


def int8_group(targets: list[str], activations: bool = True) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs if activations else None,
        "format": "int-quantized",
    }


def packed_group(targets: list[str], **changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    return {
        "targets": targets,
        "weights": weights | changes,
        "input_activations": None,
        "format": "pack-quantized",
    }


def checkpoint(vllm: Any, *groups: dict[str, Any], ignore: tuple[str, ...] = ()) -> Any:
    description = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "ignore": list(ignore),
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
    }
    cls = config_of(vllm, "llmkern")
    assert cls.override_quantization_method(description, "llmkern") == "llmkern"
    assert cls.override_quantization_method(description, None) is None
    config = cls.from_config(description)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return config


SIZES = {"input_size_per_partition": 64, "input_size": 64, "output_size": 40, "params_dtype": torch.bfloat16}


@pytest.mark.parametrize("weight_only", [False, True], ids=["", "one of three is weight-only"])
def test_an_int8_checkpoint_keeps_its_codes(vllm: Any, weight_only: bool) -> None:
    names = [f"model.layers.0.self_attn.{each}_proj" for each in "qkv"]
    config = checkpoint(vllm, int8_group(names[:2]), int8_group(names[2:], activations=not weight_only))
    prefix = "model.layers.0.self_attn.qkv_proj"
    layer = layer_of(vllm, "LinearBase", config, prefix, output_partition_sizes=[16, 12, 12], **SIZES)
    codes, scale = ops.quantize_int8(torch.randn(40, 64))
    for name, tensor in (("weight", codes), ("weight_scale", scale)):
        assert (getattr(layer, name).output_dim, getattr(layer, name).shape) == (0, tensor.shape)
        getattr(layer, name).data.copy_(tensor)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, 64).bfloat16()
    scheme = "w8a16" if weight_only else "auto"
    assert torch.equal(layer.quant_method.apply(layer, x), ops.int8_linear(x, codes, scale, scheme=scheme))


@pytest.mark.parametrize(
    ("bits", "symmetric"), [(4, True), (4, False), (5, True), (6, True)], ids=["int4", "zero points", "int5", "int6"]
)
def test_a_packed_checkpoint_keeps_its_codes(vllm: Any, bits: int, symmetric: bool) -> None:
    config = checkpoint(vllm, packed_group(["a.down_proj"], symmetric=symmetric, num_bits=bits))
    layer = layer_of(vllm, "LinearBase", config, "a.down_proj", output_partition_sizes=[40], **SIZES)
    packed = pack_groups(torch.randn(40, 64), 32, bits=bits, symmetric=symmetric)
    for name, tensor in write_pack_quantized(packed).items():
        parameter = getattr(layer, name)
        assert parameter.shape == tensor.shape, name
        parameter.data.copy_(tensor)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, 64)
    expected = ops.quantized_linear(x, packed.codes, packed.scale, packed.zero, code=packed.code, n=packed.n)
    assert torch.equal(layer.quant_method.apply(layer, x), expected)
    assert "weight_packed" not in dict(layer.named_parameters())


def test_an_embedding_of_a_checkpoint_is_tied_with_its_scales(vllm: Any) -> None:
    config = checkpoint(vllm, int8_group(["model.embed_tokens", "lm_head"]))
    sizes = SIZES | {"output_partition_sizes": [40]}
    embedding, head = (layer_of(vllm, "VocabParallelEmbedding", config, name, **sizes) for name in ("", "lm_head"))
    assert head.quant_method.tie_weights(head, embedding) is head
    codes, scale = ops.quantize_int8(torch.randn(40, 64))
    embedding.weight.data.copy_(codes)
    embedding.weight_scale.data.copy_(scale)
    for layer in (embedding, head):
        layer.quant_method.process_weights_after_loading(layer)
    ids = torch.tensor([3, 39])
    assert torch.equal(embedding.quant_method.embedding(embedding, ids), (codes * scale).bfloat16()[ids])
    x = torch.randn(2, 64)
    assert torch.equal(head.quant_method.apply(head, x), ops.int8_linear(x, codes, scale, scheme="w8a16"))


def test_a_vocabulary_in_groups_is_shared_by_its_embedding_and_head(vllm: Any) -> None:
    group = packed_group(["model.embed_tokens", "lm_head"], num_bits=6) | {"format": "int-quantized"}
    config = checkpoint(vllm, group)
    sizes = SIZES | {"output_partition_sizes": [40]}
    embedding, head = (layer_of(vllm, "VocabParallelEmbedding", config, name, **sizes) for name in ("", "lm_head"))
    assert head.quant_method.tie_weights(head, embedding) is head
    packed = pack_groups(torch.randn(40, 64), 32, bits=6)
    embedding.weight.data.copy_(packed.rows("codes").view(torch.int8) - 32)
    embedding.weight_scale.data.copy_(packed.rows("scale"))
    for layer in (embedding, head):
        layer.quant_method.process_weights_after_loading(layer)
    assert embedding.weight.data_ptr() == head.weight.data_ptr()
    ids = torch.tensor([3, 39])
    assert torch.equal(embedding.quant_method.embedding(embedding, ids), packed.dequantized().bfloat16()[ids])
    x = torch.randn(2, 64)
    expected = ops.quantized_linear(x, packed.codes, packed.scale, code=packed.code, n=packed.n)
    assert torch.equal(head.quant_method.apply(head, x), expected)
    with pytest.raises(ValueError, match="llmkern: a.up_proj has groups of int8 codes"):
        layer_of(vllm, "LinearBase", checkpoint(vllm, group | {"targets": ["a.up_proj"]}), "a.up_proj", **sizes)


def test_what_a_checkpoint_leaves_stays_vllms(vllm: Any) -> None:
    config = checkpoint(vllm, int8_group(["Linear"]), ignore=("lm_head", "a.gate"))
    layers = sys.modules[f"{LAYERS}.linear"], sys.modules[f"{LAYERS}.vocab_parallel_embedding"]
    assert type(layer_of(vllm, "LinearBase", config, "a.gate").quant_method) is layers[0].UnquantizedLinearMethod
    head = layer_of(vllm, "VocabParallelEmbedding", config, "lm_head")
    assert type(head.quant_method) is layers[1].UnquantizedEmbeddingMethod
    assert type(layer_of(vllm, "LinearBase", config, "a.up").quant_method) is part("checkpoint").StoredInt8
    assert config.get_quant_method(nn.Identity(), "a.attn") is None


def test_what_has_no_kernel_is_a_sentence(vllm: Any) -> None:
    config = checkpoint(vllm, int8_group(["a.q_proj", "a.k_proj"]), packed_group(["a.v_proj"]))
    with pytest.raises(ValueError, match=r"llmkern: a.q_proj and a.k_proj and a.v_proj are one layer in vLLM"):
        layer_of(vllm, "LinearBase", config, "a.qkv_proj")
    with pytest.raises(ValueError, match="num_bits 3"):
        checkpoint(vllm, packed_group(["Linear"], num_bits=3))
    with pytest.raises(ValueError, match="groups are not of neighbouring columns"):
        checkpoint(vllm, packed_group(["Linear"], actorder="group"))
    config = checkpoint(vllm, packed_group(["Linear"], group_size=64))
    sizes = SIZES | {"input_size_per_partition": 32, "output_partition_sizes": [40]}
    with pytest.raises(ValueError, match="32 of 64 columns on a rank are not whole groups of 64"):
        layer_of(vllm, "LinearBase", config, "a.down", **sizes)


def test_int8_is_what_the_layer_of_a_model_computes(vllm: Any) -> None:
    """The same numbers as `llmkern.nn.Int8Linear`, whose accuracy is judged elsewhere."""
    linear = nn.Linear(64, 40)
    layer = floating(vllm, "LinearBase", config_of(vllm, "llmkern_int8")(), linear.weight.data)
    x = torch.randn(9, 64)
    assert torch.equal(layer.quant_method.apply(layer, x, linear.bias), Int8Linear.from_linear(linear)(x))
