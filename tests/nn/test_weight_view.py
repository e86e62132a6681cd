"""What others see of an int8 module's weight: floating point, read when it is read, and exact when it is written."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern.nn import Int8Embedding, Int8Linear
from llmkern.testing.compare import assert_same_bits

WRITTEN = pytest.warns(UserWarning, match="the layer is floating point from now on")


def int8(n: int = 6, k: int = 8, dtype: torch.dtype = torch.float32) -> Int8Linear:
    torch.manual_seed(0)
    return Int8Linear.from_linear(nn.Linear(k, n, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_gives_codes_times_scales(dtype: torch.dtype) -> None:
    module = int8(dtype=dtype)
    wanted = (module.codes * module.weight_scale).to(dtype)
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    assert (weight.dtype, weight.shape, weight.device, weight.requires_grad) == (dtype, (6, 8), wanted.device, False)
    x = torch.randn(3, 8, dtype=dtype)
    for read in (
        lambda w: w.clone(),
        lambda w: w.detach()[2:4, ::2],
        lambda w: w.T.contiguous(),
        lambda w: torch.cat([w, w]),
        lambda w: F.linear(x, w),
        lambda w: F.embedding(torch.tensor([1, 5]), w),
        lambda w: w.norm(dim=-1),
        lambda w: torch.stack(w.unbind()),
        lambda w: w.data.view(-1).float(),
        lambda w: torch.tensor(w.tolist()),
        lambda w: w[torch.tensor([0, 3])],
    ):
        assert_same_bits(read(weight), read(wanted))
    assert str(wanted)[8:-1] in repr(weight)
    assert_same_bits(torch.from_numpy(int8().weight.numpy()), int8().dequantized_weight())
    assert type(module) is Int8Linear


def test_form_is_told_without_computing_values(monkeypatch) -> None:
    module = int8()
    monkeypatch.setattr(Int8Linear, "dequantized_weight", lambda *_: pytest.fail("values were computed"))
    weight = module.weight
    assert (weight.dtype, weight.numel(), weight.stride(), weight.is_floating_point()) == (torch.float32, 48, (8, 1), 1)
    assert torch.zeros(2, dtype=torch.float64).to(weight.dtype).dtype == torch.float32


def test_gradients_go_through_a_weight_that_is_read() -> None:
    module, x = int8(), torch.randn(3, 8, requires_grad=True)
    F.linear(x, module.weight).square().sum().backward()
    y = x.detach().requires_grad_()
    F.linear(y, module.dequantized_weight()).square().sum().backward()
    assert_same_bits(x.grad, y.grad)


@pytest.mark.parametrize(
    "write",
    [
        lambda w, new: w.copy_(new),
        lambda w, new: w.data.copy_(new),
        lambda w, new: w.data.add_(new - w),
        lambda w, new: w.data.__setitem__(slice(None), new),
        lambda w, new: w.view(-1).copy_(new.view(-1)),
        lambda w, new: [part.copy_(value) for part, value in zip(w.T.chunk(2), new.T.chunk(2), strict=True)],
        lambda w, new: [row.copy_(value) for row, value in zip(w.unbind(), new, strict=True)],
        lambda w, new: torch.add(new, 0, out=w),
        lambda w, new: w.data[:, 1:].copy_(new[:, 1:]) is w.data[:, 0].copy_(new[:, 0]),
        lambda w, new: setattr(w, "data", new),
        lambda w, new: w.index_copy_(0, torch.arange(6), new),
        lambda w, new: torch._foreach_copy_([w], [new]),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_write_makes_a_floating_point_layer_with_exactly_that(write: Callable, mode: type) -> None:
    module, new, x = int8(), torch.randn(6, 8), torch.randn(2, 8)
    with WRITTEN, mode():
        write(module.weight, new)
    assert type(module) is nn.Linear
    assert type(module.weight) is nn.Parameter
    torch.testing.assert_close(module.weight.detach(), new, rtol=1e-6, atol=1e-6)
    assert list(module.state_dict()) == ["weight", "bias"]
    assert_same_bits(module(x), F.linear(x, module.weight, module.bias))
    module.requires_grad_(True)
    module(x).sum().backward()
    assert module.weight.grad is not None


def test_what_is_added_is_added_to_what_the_codes_stand_for() -> None:
    module, delta = int8(), torch.randn(6, 8)
    wanted = module.dequantized_weight() + delta
    with WRITTEN:
        module.weight.data += delta
    assert_same_bits(module.weight.detach(), wanted)
    module.weight.data -= delta
    assert type(module) is nn.Linear


def test_views_taken_before_a_write_follow_it() -> None:
    module = int8()
    weight, row = module.weight, module.weight[3]
    with WRITTEN, torch.no_grad():
        row.zero_()
    assert not weight[3].any()
    assert weight[2].any()
    assert not module.weight[3].any()


def test_what_was_written_through_a_view_may_be_given_back_by_it() -> None:
    """As adapters do: they take `.data`, change it, and assign it."""
    for change in (lambda w: w.add_(1), lambda w: w.__iadd__(1), lambda w: torch.add(w, 1, out=w)):
        module = int8()
        wanted = module.dequantized_weight() + 1
        weight = module.weight.data
        with WRITTEN:
            changed = change(weight)
        for value in (weight, changed):
            module.weight.data = value
            assert_same_bits(module.weight.detach(), wanted)
            assert_same_bits(module(torch.eye(8)), F.linear(torch.eye(8), wanted, module.bias))


def test_layers_with_the_same_codes_stay_tied_when_one_is_written() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(10, 8)
    head = nn.Linear(8, 10, bias=False)
    head.weight = table.weight
    head = Int8Linear.from_linear(head)
    table = Int8Embedding.tied(table, head)
    assert head.weight is table.weight
    a, b = head.weight, table.weight
    assert a.data_ptr() == b.data_ptr() != int8().weight.data_ptr()  # as peft asks whether they are tied
    with WRITTEN, torch.no_grad():
        head.weight[2] = 7
    assert (type(head), type(table)) == (nn.Linear, nn.Embedding)
    assert head.weight is table.weight
    assert bool((table(torch.tensor(2)) == 7).all())


def test_assigning_a_weight() -> None:
    first, second = int8(), Int8Linear(8, 6)
    second.weight = first.weight
    assert second.codes is first.codes
    assert_same_bits(second.weight, first.weight)
    new = nn.Parameter(torch.randn(6, 8))
    with WRITTEN:
        second.weight = new
    assert type(second) is nn.Linear
    assert second.weight is new
    assert type(first) is nn.Linear  # it had the same codes


def test_training_a_layer_makes_it_floating_point() -> None:
    for train in (lambda m: m.requires_grad_(True), lambda m: m.weight.requires_grad_(True)):
        module = int8()
        with WRITTEN:
            train(module)
        module(torch.randn(2, 8)).sum().backward()
        assert module.weight.grad is not None
    with pytest.raises(RuntimeError, match="a view of an int8 weight cannot require gradients"):
        int8().weight[0].requires_grad_()
    frozen = int8().requires_grad_(False)
    assert type(frozen) is Int8Linear


def test_a_floating_point_state_loads_exactly() -> None:
    source, module = nn.Linear(8, 6), int8()
    with WRITTEN:
        module.load_state_dict(source.state_dict(), strict=True)
    assert type(module) is nn.Linear
    assert_same_bits(list(module.parameters()), list(source.parameters()))


def test_a_written_conv1d_keeps_the_state_dict_of_one() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 8)
    module = Int8Linear.from_linear(conv1d)
    assert module.weight.shape == (6, 8)
    with WRITTEN, torch.no_grad():
        module.weight.mul_(2)
    assert isinstance(module, nn.Linear)
    state = module.state_dict()
    assert state["weight"].shape == (8, 6)
    assert_same_bits(state["weight"].T, module.weight.detach())
    module.load_state_dict(conv1d.state_dict())
    assert_same_bits(module.weight.detach().T, conv1d.weight.detach())


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent_and_int8(carry: Callable) -> None:
    module = nn.ModuleDict({"a": int8()})
    module["b"] = Int8Linear(8, 6)
    module["b"].weight = module["a"].weight
    held = module["a"].weight
    other = carry(module)
    assert type(other["a"]) is Int8Linear
    assert other["a"].codes is other["b"].codes
    assert_same_bits(other["a"].weight, held)
    with WRITTEN, torch.no_grad():
        other["a"].weight.zero_()
    assert type(other["b"]) is nn.Linear
    assert type(module["a"]) is type(module["b"]) is Int8Linear
    assert type(carry(held)) is Tensor


def test_dtype_and_device_come_first_among_the_parameters() -> None:
    """`next(module.parameters()).dtype` is what much code asks."""
    for module in (int8(dtype=torch.bfloat16), Int8Embedding(4, 8, dtype=torch.bfloat16)):
        assert next(module.parameters()).dtype == torch.bfloat16
        assert sum(p.numel() for p in module.parameters() if p.is_floating_point() and p.dim() > 1) == 0


def test_compiled_code_reads_it_too() -> None:
    torch._dynamo.reset()
    module, x = int8(), torch.randn(3, 8)

    def both(x: Tensor) -> Tensor:
        return module(x) + F.linear(x, module.weight) * module.weight[0, 0]

    assert_same_bits(torch.compile(both, backend="aot_eager", fullgraph=True)(x), both(x))


def test_a_subclass_of_somebody_else_is_not_lost() -> None:
    class Mine(Int8Linear):
        pass

    module = Mine(8, 6)
    with pytest.raises(RuntimeError, match="the weight of a Mine cannot be written: dequantize_ the model first"):
        module.weight.data += 1
    assert type(module) is Mine


def test_accelerate_s_offloading_moves_the_codes() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(int8(8, 8), nn.ReLU(), int8(8, 8))
    x = torch.randn(2, 8)
    wanted = model(x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert_same_bits(model(x), wanted)
    assert_same_bits(model(x), wanted)


def test_what_is_moved_is_a_copy() -> None:
    module = int8()
    moved = module.weight.to("meta")
    assert (moved.device.type, moved.dtype, moved.shape) == ("meta", torch.float32, (6, 8))
    with WRITTEN:
        moved.zero_()
    assert type(module) is Int8Linear


def test_codes_that_are_taken_away_are_missed() -> None:
    module = int8()
    del module.weight
    with pytest.raises(RuntimeError, match="the codes of the Int8Linear were taken away"):
        module(torch.randn(2, 8))


def test_nothing_warns_where_nothing_is_written() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = int8()
        module(torch.randn(2, 8)), module.weight.sum(), module.half(), module.float(), module.state_dict()
        copy.deepcopy(module), module.requires_grad_(False), module.eval()
