"""Weights on huge pages: the same tensors with the same values, in other memory."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import pytest
import torch
from torch import nn

import llmkern
from llmkern import memory
from llmkern.memory import MIN_BYTES, move_to_huge_pages_

available = pytest.mark.skipif(not memory._available(), reason="this system gives no huge pages")
ROWS = MIN_BYTES // 4 // 1024 + 1  # of 1024 fp32 columns, more than are left where they are


@pytest.fixture
def model() -> nn.Module:
    """Two layers, the second with the first's weight transposed: another tensor of the same storage."""
    model = nn.Sequential(nn.Linear(1024, ROWS), nn.Linear(ROWS, 1024, bias=False), nn.BatchNorm1d(1024))
    model[1].weight = nn.Parameter(model[0].weight.detach().T)
    return model.eval()


@available
def test_values_objects_and_aliases_stay(model: nn.Module) -> None:
    tensors = {name: (t, t.clone(), t.stride(), t.data_ptr()) for name, t in model.state_dict(keep_vars=True).items()}
    with torch.device("meta"):  # a default device is for tensors that users make
        moved = move_to_huge_pages_(model)
    assert moved == sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - model[1].weight.nbytes
    for name, tensor in model.state_dict(keep_vars=True).items():
        before, value, stride, pointer = tensors[name]
        assert tensor is before
        assert torch.equal(tensor, value)
        assert tensor.stride() == stride
        assert (tensor.data_ptr() == pointer) == (tensor.nbytes >= 8 << 20)
    with torch.no_grad():
        model[0].weight[0, 1] = 77.0
    assert model[1].weight[1, 0] == 77.0
    assert move_to_huge_pages_(model) == 0, "what has been moved is moved again"


@available
def test_moved_tensors_are_trained_copied_and_saved_as_others(model: nn.Module, tmp_path: Path) -> None:
    move_to_huge_pages_(model)
    copied = copy.deepcopy(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    model(torch.randn(2, 1024)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(model[0].weight, copied[0].weight)
    model.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(model[0].weight, copied[0].weight)


@available
def test_memory_is_huge_and_goes_with_its_tensors(model: nn.Module) -> None:
    gc.collect()
    before = len(memory._arenas)
    move_to_huge_pages_(model)
    assert len(memory._arenas) > before
    with torch.no_grad():
        weight, begin = model[0].weight.clone(), model[0].weight.data_ptr()
    assert huge_bytes_at(begin + (2 << 20)) > weight.nbytes * 3 // 4
    del model[:]
    gc.collect()
    assert len(memory._arenas) == before
    assert weight.isfinite().all()


@available
def test_small_weights_share_huge_pages() -> None:
    layers = nn.Sequential(*[nn.Linear(1024, 512) for _ in range(20)])
    pointers = [layer.weight.data_ptr() for layer in layers]
    move_to_huge_pages_(layers)
    assert not set(pointers) & {layer.weight.data_ptr() for layer in layers}
    assert huge_bytes_at(layers[5].weight.data_ptr()) > MIN_BYTES // 2


@available
@torch.no_grad()
def test_what_others_hold_follows_or_stays() -> None:
    """An older state_dict, a view, a tensor of the same storage: whoever writes to it writes to the model."""
    layers = nn.Sequential(*[nn.Linear(1024, 512) for _ in range(20)], nn.Linear(2048, 2048))
    held, row = layers[1].state_dict(), layers[2].weight[3]
    large = layers[20].weight.view(-1)
    assert move_to_huge_pages_(layers) > 0
    for writes, sees in ((held["weight"], layers[1].weight), (row, layers[2].weight[3]), (large, layers[20].weight)):
        writes.fill_(3.0)
        assert (sees == 3.0).all()


@available
def test_moving_back_undoes_it_but_for_what_others_hold() -> None:
    layers = nn.Sequential(*[nn.Linear(1024, 512) for _ in range(20)])
    layers[1].weight = nn.Parameter(layers[0].weight.detach().T)  # another tensor of one storage
    values = {name: value.clone() for name, value in layers.state_dict().items()}
    move_to_huge_pages_(layers)
    arenas = len(memory._arenas)
    row = layers[3].weight[0]
    assert memory.move_back_(layers) == sum(t.nbytes for t in layers.parameters()) - 2 * layers[3].weight.nbytes
    assert len(memory._arenas) <= arenas
    with torch.no_grad():
        for name, value in layers.state_dict().items():
            assert torch.equal(value, values[name])
        row.fill_(3.0)
        assert (layers[3].weight[0] == 3.0).all()
        layers[0].weight[0, 1] = 77.0
    assert layers[1].weight[1, 0] == 77.0


@available
def test_restore_undoes_it() -> None:
    layers = nn.Sequential(*[nn.Linear(1024, 512) for _ in range(20)], nn.LayerNorm(512))
    llmkern.optimize_(layers, on_unsupported="ignore")
    assert any(memory._in_arena(t.untyped_storage().data_ptr()) for t in layers.parameters())
    llmkern.restore_(layers)
    assert not any(memory._in_arena(t.untyped_storage().data_ptr()) for t in layers.parameters())


@available
def test_a_large_storage_can_still_be_resized(model: nn.Module) -> None:
    """FSDP gives memory back by it."""
    move_to_huge_pages_(model)
    value = model[0].weight.detach().clone()
    storage = model[0].weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    model[0].weight.data.copy_(value)
    assert torch.equal(model[0].weight, value)


@available
def test_weights_moved_in_inference_mode_can_be_trained(model: nn.Module) -> None:
    with torch.inference_mode():
        move_to_huge_pages_(model)
    model(torch.randn(2, 1024)).sum().backward()


def huge_bytes_at(address: int) -> int:
    """Count the huge-page bytes of the mapping that holds the address, as the kernel reports them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(end, 16) for end in head.split("-"))
            inside = low <= address < high
        elif inside and head == "AnonHugePages:":
            return int(line.split()[1]) * 1024
    return 0


@available
def test_what_must_not_move_stays(model: nn.Module) -> None:
    small = nn.Linear(64, 64)
    assert move_to_huge_pages_(small) == 0
    model[0].weight.data = model[0].weight.data.share_memory_()
    pointer = model[0].weight.data_ptr()
    move_to_huge_pages_(model)
    assert model[0].weight.data_ptr() == pointer
    assert model[0].weight.is_shared()


@available
def test_a_system_without_memory_leaves_the_rest(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(memory, "_Arena", refuse)
    monkeypatch.setattr(memory, "_remap", lambda begin, size: False)
    before = copy.deepcopy(model.state_dict())
    assert move_to_huge_pages_(model) == 0
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_system_without_huge_pages_moves_nothing(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    for setting in (tmp_path / "enabled", tmp_path / "nowhere"):
        monkeypatch.setattr(memory, "_SETTING", setting)
        assert move_to_huge_pages_(model) == 0


@available
def test_optimize_moves_and_says_so_unless_told_not_to() -> None:
    model = nn.Sequential(nn.LayerNorm(1024), nn.Linear(1024, ROWS)).eval()
    pointer = model[1].weight.data_ptr()
    report = llmkern.report(llmkern.optimize_(model, huge_pages=False)).swap
    assert report.moved_bytes == 0
    assert model[1].weight.data_ptr() == pointer
    assert "huge pages" not in str(report)
    report = llmkern.report(llmkern.optimize_(model)).swap
    assert report.moved_bytes == report.to_dict()["moved_bytes"] > MIN_BYTES
    assert "huge pages" in str(report)
    value = model[1].weight.clone()
    llmkern.restore_(model)
    assert torch.equal(model[1].weight, value)


@available
def test_quantize_moves_the_codes() -> None:
    model = nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 4096), nn.Linear(4096, 1024)).eval()
    llmkern.quantize_(model)
    assert huge_bytes_at(model[0].codes.data_ptr() + (2 << 20)) > 0


@available
def test_tensors_of_inference_mode_move_too() -> None:
    with torch.inference_mode():
        model = nn.Linear(1024, ROWS)
        x = torch.randn(2, 1024)
        before = model(x)
        assert move_to_huge_pages_(model) >= MIN_BYTES
        assert torch.equal(model(x), before)
