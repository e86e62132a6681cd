from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from llmkern import ops
from llmkern.nn import Int8Linear
from llmkern.testing.compare import assert_same_bits


def linear(n: int = 24, k: int = 40, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    generator = torch.Generator().manual_seed(n * k)
    module = nn.Linear(k, n, bias=bias)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.to(dtype)


def rows(k: int = 40, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(6, k, generator=torch.Generator().manual_seed(1)).to(dtype)


def conv1d(n: int = 24, k: int = 40) -> nn.Module:
    module = pytest.importorskip("transformers.pytorch_utils").Conv1D(n, k)
    nn.init.normal_(module.bias)
    return module


@pytest.mark.parametrize("bias", [True, False])
def test_is_the_op_on_quantized_weights(bias: bool) -> None:
    source, x = linear(bias=bias), rows()
    module = Int8Linear.from_linear(source, scheme="w8a8")
    codes, scale = ops.quantize_int8(source.weight.detach())
    assert isinstance(module, nn.Linear)
    assert (module.in_features, module.out_features) == (40, 24)
    assert_same_bits(module(x), ops.int8_linear(x, codes, scale, source.bias, scheme="w8a8"))
    assert (module(x) - source(x)).abs().max() < 0.03 * source(x).abs().max()
    assert module.bias is source.bias


def test_half_a_step_is_the_largest_weight_error() -> None:
    source = linear()
    module = Int8Linear.from_linear(source)
    gap = (module.dequantized_weight() - source.weight).abs()
    assert bool((gap <= module.weight_scale * 0.5001).all())


def test_conv1d_becomes_the_transposed_layer() -> None:
    source, x = conv1d(), rows()
    module = Int8Linear.from_linear(source, scheme="w8a16")
    assert module.from_conv1d
    assert (module(x) - source(x)).abs().max() < 0.02 * source(x).abs().max()


def test_to_linear_goes_back_to_what_the_codes_stand_for() -> None:
    source = linear(dtype=torch.bfloat16)
    source.eval()
    back = Int8Linear.from_linear(source).to_linear()
    assert type(back) is nn.Linear
    assert back.weight.dtype == torch.bfloat16
    assert not back.training
    assert (back.weight - source.weight).abs().max() < 0.01 * source.weight.abs().max()
    wide = Int8Linear.from_linear(source).to_linear(torch.float32)
    assert wide.weight.dtype == wide.bias.dtype == torch.float32


@pytest.mark.parametrize(
    "convert",
    [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float64), lambda m: m.half().float()],
    ids=["half", "bfloat16", "float64", "half-and-back"],
)
def test_conversion_of_the_dtype_touches_neither_codes_nor_scales(convert) -> None:
    module = Int8Linear.from_linear(linear())
    codes, scale = module.codes.clone(), module.weight_scale.clone()
    convert(module)
    assert_same_bits([module.codes, module.weight_scale], [codes, scale])
    assert module.weight.dtype == module.dtype
    assert module.bias.dtype == module.dtype == module.to_linear().weight.dtype
    assert module(rows(dtype=module.dtype)).dtype == module.dtype


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_copies_and_state_dicts_are_bit_equal(scheme: str) -> None:
    module, x = Int8Linear.from_linear(linear(), scheme=scheme), rows()
    expected = module(x)
    assert_same_bits(copy.deepcopy(module)(x), expected)
    assert_same_bits(pickle.loads(pickle.dumps(module))(x), expected)
    fresh = Int8Linear(40, 24)
    fresh.load_state_dict(module.state_dict(), strict=True)
    assert fresh.scheme == scheme
    assert_same_bits(fresh(x), expected)
    other = Int8Linear(40, 24, device="meta")
    other.load_state_dict(module.state_dict(), assign=True)
    assert_same_bits(other(x), expected)


def test_state_dict_is_a_quarter_of_fp32_on_disk() -> None:
    stack = nn.Sequential(*[linear(256, 256, bias=False) for _ in range(4)])
    small = nn.Sequential(*[Int8Linear.from_linear(layer) for layer in stack])

    def torch_bytes(module: nn.Module) -> int:
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        return file.getbuffer().nbytes

    save = pytest.importorskip("safetensors.torch").save
    assert torch_bytes(stack) > 3.7 * torch_bytes(small)
    assert len(save(dict(stack.state_dict()))) > 3.8 * len(save(dict(small.state_dict())))


def test_a_checkpoint_of_another_program_loads_strictly() -> None:
    """compressed-tensors stores scales in the model's dtype and knows nothing of our scheme."""
    source = Int8Linear.from_linear(linear())
    state = {name: value for name, value in source.state_dict().items() if "extra" not in name}
    state["weight_scale"] = state["weight_scale"].bfloat16()
    module = Int8Linear(40, 24, scheme="w8a16")
    module.load_state_dict(state, strict=True)
    assert module.scheme == "w8a16"
    assert_same_bits(module.weight_scale, state["weight_scale"].float())


def nan_scale(state: dict) -> None:
    state["weight_scale"][3] = float("nan")


def negative_scale(state: dict) -> None:
    state["weight_scale"][3] = -1.0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.update(weight=s["weight"].float()), r"weight is torch.float32, expected torch.int8"),
        (lambda s: s.update(weight=s["weight"][:3]), r"weight has shape \[3, 40\], expected \[24, 40\]"),
        (lambda s: s.update(weight_scale=s["weight_scale"].long()), "weight_scale is torch.int64, expected a float"),
        (lambda s: s.update(weight_scale=s["weight_scale"][:1]), r"weight_scale has shape \[1, 1\], expected \[24, 1"),
        (lambda s: s.pop("weight_scale"), "weight_scale is missing"),
        (lambda s: s.update(bias=s["bias"][:1]), r"bias has shape \[1\], expected \[24\]"),
        (lambda s: s.update(_extra_state=torch.tensor(9)), r"_extra_state is tensor\(9\), expected a tensor from 0"),
        (nan_scale, "weight_scale has NaN, infinite or negative"),
        (negative_scale, "weight_scale has NaN, infinite or negative"),
    ],
)
def test_a_wrong_state_dict_changes_nothing(damage, message: str) -> None:
    module, other = Int8Linear.from_linear(linear(), scheme="w8a8"), Int8Linear.from_linear(linear(24, 40, bias=True))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = {name: value.clone() + (value.dtype == torch.int8) for name, value in other.state_dict().items()}
    damage(state)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)
    assert_same_bits(list(module.state_dict().values()), list(before.values()))


def test_an_adapter_beside_it_trains() -> None:
    module = Int8Linear.from_linear(linear())
    down, up = nn.Linear(40, 4), nn.Linear(4, 24)
    x = rows().requires_grad_()
    (module(x) + up(down(x))).square().sum().backward()
    assert x.grad is not None
    assert module.bias.grad is not None
    assert module.codes.grad is None


def test_hooks_and_training_flag_come_along() -> None:
    source, seen = linear(), []
    source.eval().register_forward_hook(lambda *_: seen.append(1))
    module = Int8Linear.from_linear(source)
    module(rows())
    assert seen == [1]
    assert not module.training


def test_repr_names_the_scheme() -> None:
    text = repr(Int8Linear.from_linear(linear(), scheme="w8a16"))
    assert text == "Int8Linear(in_features=40, out_features=24, bias=True, scheme=w8a16, dtype=torch.float32)"


def test_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    module = Int8Linear.from_linear(linear())
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(rows()), module(rows()))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="scheme is 'fp4', expected 'auto' or 'w8a8' or 'w8a16'"):
        Int8Linear(4, 4, scheme="fp4")
    with pytest.raises(TypeError, match="dtype is torch.int8, expected float32"):
        Int8Linear(4, 4, dtype=torch.int8)
    with pytest.raises(TypeError, match="module is a ReLU, expected nn.Linear or transformers' Conv1D"):
        Int8Linear.from_linear(nn.ReLU())
    with pytest.raises(TypeError, match="quantized already"):
        Int8Linear.from_linear(Int8Linear.from_linear(linear()))
    with pytest.raises(ValueError, match="meta device"):
        Int8Linear.from_linear(nn.Linear(4, 4, device="meta"))
    broken = linear()
    broken.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="weight has NaN or infinite values"):
        Int8Linear.from_linear(broken)
    with pytest.raises(RuntimeError, match="no random initialisation"):
        Int8Linear(4, 4).reset_parameters()
