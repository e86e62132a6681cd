"""Linear layers and embeddings over packed weights, as anybody who meets an nn.Linear uses them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from llmkern import ops
from llmkern.nn import PackedEmbedding, PackedLinear, QuantizedLinear
from llmkern.nn.quantized_linear import LinearOfConv1D
from llmkern.packed import PackedWeight
from llmkern.quantization.formats.blocks import pack_groups, pack_int8_blocks
from llmkern.testing.case import Make
from llmkern.testing.cases.quantized_linear import KINDS, random_packed
from llmkern.testing.compare import assert_same_bits


def linear(n: int = 24, k: int = 64, dtype: torch.dtype = torch.float32) -> nn.Linear:
    generator = torch.Generator().manual_seed(n * k)
    module = nn.Linear(k, n)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.to(dtype)


def rows(k: int = 64, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(6, k, generator=torch.Generator().manual_seed(1)).to(dtype)


def packed(kind: str, n: int = 24, k: int = 256) -> PackedWeight:
    return random_packed(Make(torch.float32, "cpu", 0), kind, n, k)


def int4(source: nn.Module, group: int = 32) -> PackedLinear:
    return PackedLinear.from_linear(source, pack_groups(source.weight.detach(), group))


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_op_and_shows_the_weight(kind: str) -> None:
    weight, x = packed(kind), rows(256)
    module = PackedLinear(weight, nn.Parameter(torch.randn(24)))
    assert isinstance(module, nn.Linear)
    assert isinstance(module, QuantizedLinear)
    assert (module.in_features, module.out_features, module.weight.shape) == (256, 24, (24, 256))
    assert_same_bits(module.weight.clone(), weight.dequantized())
    groups = {name: getattr(weight, name) for name in ("zero", "offset", "super_scale", "super_offset")}
    expected = ops.quantized_linear(
        x, weight.codes, weight.scale, **groups, bias=module.bias, code=weight.code, n=weight.n
    )
    assert_same_bits(module(x), expected)
    assert_same_bits(module.to_linear().weight.detach(), weight.dequantized())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_looked_up_in_the_packed_weight(kind: str) -> None:
    weight = packed(kind, 37)
    table = PackedEmbedding(weight, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 15, 16], [36, 3, 0]])
    assert isinstance(table, nn.Embedding)
    assert_same_bits(weight.take(ids), weight.dequantized()[ids])
    assert_same_bits(table(ids), weight.dequantized()[ids].bfloat16())
    assert table(ids[:0]).shape == (0, 3, 256)
    for wrong in (37, 40, -1):
        with pytest.raises(IndexError, match="index out of range"):
            table(torch.tensor([wrong]))


def test_an_embedding_tied_to_a_head_holds_its_codes() -> None:
    source = nn.Embedding(48, 64)
    head = nn.Linear(64, 48, bias=False)
    head.weight = source.weight
    first = PackedLinear.from_linear(head, pack_int8_blocks(source.weight.detach()))
    table = PackedEmbedding.tied(source, first)
    assert table.codes is first.codes
    assert table.weight is first.weight
    other = PackedEmbedding.from_embedding(source, pack_groups(source.weight.detach()))
    other.weight = first.weight  # as tie_weights does
    assert (other.codes is first.codes, other.code, other.kind) == (True, "s8", "int8-block")
    assert_same_bits(other(torch.arange(48)), first.weight.clone())


def test_columns_out_of_order_are_multiplied_with_their_own_inputs() -> None:
    source, x = linear(), rows()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    module = PackedLinear(pack_groups(source.weight.detach()[:, order]), source.bias, permutation=order)
    straight = PackedLinear.from_linear(source, pack_int8_blocks(source.weight.detach()))
    assert (module(x) - straight(x)).norm() < 0.2 * straight(x).norm()
    assert (module.weight - source.weight).norm() < 0.15 * source.weight.norm()


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.bfloat16().float(), lambda m: m.double()])
def test_conversion_of_the_dtype_touches_neither_codes_nor_scales(convert) -> None:
    module = int4(linear())
    before = [module.codes.clone(), module.weight_scale.clone()]
    convert(module)
    assert_same_bits([module.codes.detach(), module.weight_scale], before)
    assert module.weight.dtype == module.bias.dtype == module.dtype == module(rows(dtype=module.dtype)).dtype


@pytest.mark.parametrize("kind", ["q4_k", "u4-zero-g64", "q8_0"])
def test_copies_and_state_dicts_are_bit_equal(kind: str) -> None:
    module, x = PackedLinear(packed(kind), nn.Parameter(torch.randn(24))), rows(256)
    expected = module(x)
    assert_same_bits(copy.deepcopy(module)(x), expected)
    assert_same_bits(pickle.loads(pickle.dumps(module))(x), expected)
    fresh = PackedLinear(random_packed(Make(torch.float32, "cpu", 5), kind, 24, 256), nn.Parameter(torch.zeros(24)))
    fresh.load_state_dict(module.state_dict(), strict=True)
    assert_same_bits(fresh(x), expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.update(weight=s["weight"].int()), "weight is torch.int32, expected torch.uint8"),
        (lambda s: s.update(weight=s["weight"][:1]), r"weight has shape \[1, 2, 256\], expected \[2, 2, 256\]"),
        (lambda s: s.pop("weight_scale"), "weight_scale is missing, without which the codes"),
        (
            lambda s: s.update(weight_scale=s["weight_scale"].float()),
            "weight_scale is torch.float32, expected torch.fl",
        ),
        (lambda s: s["weight_scale"].fill_(float("inf")), "weight_scale has NaN or infinite values"),
        (lambda s: s.update(_extra_state=torch.tensor(2)), r"_extra_state is tensor\(2\), .*in code 's4'"),
        (lambda s: s.update(bias=s["bias"][:1]), r"bias has shape \[1\], expected \[24\]"),
    ],
)
def test_a_wrong_state_dict_changes_nothing(damage, message: str) -> None:
    module, other = int4(linear()), int4(linear(24, 64))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = {name: value.clone() for name, value in other.state_dict().items()}
    state["weight"] ^= 1
    damage(state)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)
    assert_same_bits(list(module.state_dict().values()), list(before.values()))


def test_an_adapter_beside_it_trains() -> None:
    module, x = int4(linear()), rows().requires_grad_()
    module(x).square().sum().backward()
    assert x.grad is not None
    assert module.bias.grad is not None
    assert module.codes.grad is None


def test_what_is_merged_into_the_weight_is_exact() -> None:
    module = int4(linear())
    expected = module.dequantized_weight() + 1
    with pytest.warns(UserWarning, match="the weight of an int4 g32 layer is written .*makes it int4 again"):
        module.weight.data += 1
    assert type(module) is nn.Linear
    assert_same_bits(module.weight.detach(), expected)
    floating = int4(linear())
    with pytest.warns(UserWarning, match="llmkern"):
        floating.load_state_dict(linear().state_dict())
    assert_same_bits(floating.weight.detach(), linear().weight.detach())


def test_conv1d_becomes_the_transposed_layer() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(24, 64)
    module = PackedLinear.from_linear(conv1d, pack_int8_blocks(conv1d.weight.detach().T))
    assert (module(rows()) - conv1d(rows())).norm() < 0.02 * conv1d(rows()).norm()
    with pytest.warns(UserWarning, match="llmkern"):
        module.make_floating()
    assert type(module) is LinearOfConv1D


def test_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    module = int4(linear())
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(rows()), module(rows()))


def test_bad_input() -> None:
    weight = pack_groups(linear().weight.detach())
    with pytest.raises(TypeError, match="PackedLinear: module is a ReLU, expected nn.Linear or"):
        PackedLinear.from_linear(nn.ReLU(), weight)
    with pytest.raises(TypeError, match="quantized already"):
        PackedLinear.from_linear(int4(linear()), weight)
    with pytest.raises(ValueError, match=r"packed is \[24, 64\], expected \[24, 96\]"):
        PackedLinear.from_linear(linear(24, 96), weight)
    with pytest.raises(ValueError, match="PackedEmbedding: max_norm is 1.0"):
        PackedEmbedding.from_embedding(nn.Embedding(24, 64, max_norm=1.0), weight)
    with pytest.raises(RuntimeError, match="a PackedLinear has no random initialisation"):
        int4(linear()).reset_parameters()
