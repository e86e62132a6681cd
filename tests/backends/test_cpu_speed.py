"""Where PyTorch is measured to be faster: the table, who reads it, what writes it; and that no trace depends on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from instruction_sets import here, on

from llmkern import _native, dispatch, ops
from llmkern.backends.cpu import _speed, _tune
from llmkern.testing.recorder import Recorder

built = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replaces both tables by the given one."""

    def replace(content: _speed.Table) -> None:
        monkeypatch.setattr(_speed, "tables", lambda: (content,))
        for op in _tune.tunable():
            dispatch.replace_implementations(op, dispatch.implementations(op))

    yield replace
    monkeypatch.undo()
    for op in _tune.tunable():
        dispatch.replace_implementations(op, dispatch.implementations(op))


def chosen(n: int) -> str:
    x = torch.zeros(1, n)
    return dispatch.select("swiglu", {"gate": x, "up": x}).backend.name


@built
def test_sizes_outside_of_the_table_are_pytorchs_with_a_sentence(table) -> None:
    table({"swiglu": {"portable": {"float32": [100, 200]}}})
    assert [chosen(n) for n in (99, 100, 200, 201)] == ["torch", "cpu", "cpu", "torch"]
    why_not = dispatch.implementation("swiglu", "cpu").why_not
    few, many = torch.zeros(99), torch.zeros(201)
    assert why_not(gate=few, up=few) == "gate has 99 elements; at least 100 are taken: with fewer, PyTorch is faster"
    assert why_not(gate=many, up=many) == "gate has 201 elements; at most 200 are taken: with more, PyTorch is faster"


@built
def test_a_forced_backend_serves_what_it_is_slow_at(table) -> None:
    table({"swiglu": {"portable": {"float32": [100, None]}}})
    with dispatch.use_backend("cpu"):
        assert chosen(1) == "cpu"


@built
def test_the_nearest_lower_instruction_set_counts_and_a_change_of_it_at_once(table) -> None:
    table({"swiglu": {"portable": {"float32": [100, None]}, "avx2": {"float32": [None, None]}}})
    x = torch.zeros(1, 10)
    served = {}
    for isa in here():
        with on(isa), torch.no_grad(), dispatch.recording(recorder := Recorder()):
            ops.swiglu(x, x)
            served[isa] = recorder.backends
    assert served.pop("portable") == ["torch"]
    assert all(backends == ["cpu"] for backends in served.values())


@built
def test_a_set_instruction_set_changes_what_was_remembered(table) -> None:
    table({"swiglu": {"portable": {"float32": [100, None]}, "avx2": {"float32": [None, None]}}})
    if "avx2" not in here():
        pytest.skip("this CPU has no AVX2")
    x = torch.zeros(1, 10)
    with torch.no_grad():
        for _ in range(3):
            ops.swiglu(x, x)
        assert dispatch.OPS["swiglu"].served
        with on("portable"):
            assert not dispatch.OPS["swiglu"].served
            assert not dispatch.OPS["swiglu"].recent


@built
@pytest.mark.parametrize("limits", [[100, None], [None, 100]], ids=str)
def test_an_exported_program_holds_on_both_sides_of_a_limit(table, limits) -> None:
    table({"swiglu": {"portable": {"float32": limits}}, "layer_norm": {"portable": {"float32": limits}}})

    class Module(torch.nn.Module):
        def forward(self, x):
            y = ops.linear(ops.swiglu(x, x) + ops.layer_norm(x), weight)
            return y, ops.int8_linear(x, codes, scale, scheme="w8a8")

    weight, codes, scale = torch.randn(3, 10), torch.ones(3, 10, dtype=torch.int8), torch.ones(3, 1)
    module = Module()
    for dim in (torch.export.Dim.DYNAMIC, torch.export.Dim("rows", min=2, max=100)):
        for strict in (False, True):
            program = torch.export.export(module, (torch.randn(5, 10),), dynamic_shapes=({0: dim},), strict=strict)
            for rows in (2, 3, 9, 10, 11, 100):
                x = torch.randn(rows, 10)
                torch.testing.assert_close(program.module()(x), module(x))


@built
def test_a_compiled_function_is_not_compiled_again_on_the_other_side(table) -> None:
    table({"swiglu": {"portable": {"float32": [100, None]}}})
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.swiglu(x, x), backend=backend, dynamic=True)
    for rows in (2, 9, 10, 11, 50):
        compiled(torch.randn(rows, 10))
    assert len(compiles) == 1


def test_the_longest_run_of_sizes_that_are_not_slower() -> None:
    for speeds, expected in (
        ([1, 1, 1], (None, None)),
        ([0.5, 1, 1], (2, None)),
        ([1, 1, 0.5], (None, 2)),
        ([0.5, 1, 0.9, 1, 1], (4, None)),
        ([0.5, 0.5, 0.5], (2**63 - 1, None)),
    ):
        assert _tune.longest_run(dict(enumerate(speeds, 1))) == expected


@built
def test_tune_writes_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tune, "SIZES", (8, 16))
    monkeypatch.setattr(_tune, "ROUNDS", 1)
    clock = iter([1.0, 0.5, 1.0, 2.0] * 3)  # ours, PyTorch's: half as fast at 8 elements, twice at 16
    path = tmp_path / "a folder" / "speed.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"gelu-none": {"portable": {"float32": [1, 2]}}}))
    found = list(_tune.tune("swiglu", path, lambda call: next(clock)))
    assert [(each.dtype, each.least, each.most) for each in found] == [
        (dtype, 16, None) for dtype in ("float32", "bfloat16", "float16")
    ]
    table = _speed.read_table(path)
    assert table["swiglu"] == {_native.cpu_isa(): dict.fromkeys(("float32", "bfloat16", "float16"), [16, None])}
    assert table["gelu-none"] == {"portable": {"float32": [1, 2]}}
    with pytest.raises(ValueError, match=r"'rope' has no sizes to tune on the CPU; these have: add_layer_norm, gelu, "):
        next(_tune.tune("rope", path, lambda call: 1.0))


def test_the_committed_table_names_ops_instruction_sets_and_dtypes() -> None:
    names = {
        measured.name(variant)
        for op in _tune.tunable()
        for measured in [dispatch.implementation(op, "cpu").slower]
        for variant in measured.variants or (None,)
    }
    for name, by_isa in _speed.read_table(_speed.BUILT_IN).items():
        assert name in names
        assert set(by_isa) <= set(_native.CPU_ISAS)
        assert {dtype for by_dtype in by_isa.values() for dtype in by_dtype} <= {"float32", "bfloat16", "float16"}
