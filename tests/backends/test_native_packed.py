"""Packed weights as those of a layer's linear layers, beside the definition of `quantized_linear`."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from instruction_sets import here, on
from torch import Tensor

from llmkern import _native, dispatch
from llmkern.ops import layers_
from llmkern.ops._layer_packed import handle_of
from llmkern.ops._layer_plan import layers_of, plan_layers
from llmkern.packed import PackedWeight
from llmkern.programs.program import parse
from llmkern.testing.case import Call, Make
from llmkern.testing.cases._families import FAMILIES
from llmkern.testing.cases._programs import call_of
from llmkern.testing.cases.layers_ import llama
from llmkern.testing.cases.quantized_linear import random_packed
from llmkern.testing.judge import cloned, reference

pytestmark = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))

NATIVE = torch.ops.llmkern.layers_
ROWS = ["qkv[0:64]", "qkv[64:96]", "qkv[96:128]", "o", "gate_up[0:128]", "gate_up[128:256]", "down"]
PROGRAMS = {"llama": llama(16), "phi3": llama(16, places=ROWS), "gpt-neox": FAMILIES["gpt-neox"]}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def packed_call(name: str, *kinds: str, dtype: torch.dtype = torch.float32, **how: Any) -> Call:
    """A call with a layer for each kind of packed weights; biases stay."""
    make = Make(dtype, "cpu", 0)
    sizes = {"hidden": 64, "inner": 128} if name != "gpt-neox" else {"hidden": 256, "inner": 256, "heads": (32, 32)}
    call = call_of(make, PROGRAMS[name], **({"queries": 2, "past": 3} | sizes | how), layers=len(kinds))
    first = 0
    for kind in kinds:
        for parameter in parse(PROGRAMS[name]).parameters():
            if parameter.kind == "linear":
                call["parameters"][first] = handle_of(random_packed(make, kind, *call["parameters"][first].shape))
            first += {"linear": 3, "norm": 2, "tensor": 1}[parameter.kind]
    return call


def run(call: Call, **changes: Any) -> list[Tensor]:
    caches = cloned(call["caches"])
    return [NATIVE(**(call | {"caches": caches} | changes)), *caches]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "q8_0"), ("phi3", "s4-g32"), ("llama", "u4-zero-g64"), ("gpt-neox", "q6_k"), ("phi3", "u4-offset")],
)
def test_a_layer(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to codes of x that a rounding puts on the other side of a tie."""
    call = packed_call(name, kind)
    assert dispatch.implementation("layers_", "cpu").why_not(**call) is None
    expected = reference("layers_", call)
    monkeypatch.setattr(dispatch, "implementation", lambda *_: pytest.fail("the reference was called"))
    for isa in here():
        with on(isa):
            for out, right in zip(run(call), expected, strict=True):
                torch.testing.assert_close(out, right, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_the_bits_of_threads_and_plans(queries: int) -> None:
    call = packed_call("phi3", "q8_0", "s4-g32", queries=queries, dtype=torch.bfloat16)
    torch.set_num_threads(1)
    wanted = run(call)
    plan = plan_layers(call["programs"], call["parameters"])
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert all(map(torch.equal, run(call), wanted)), count
        assert all(map(torch.equal, run(call, programs=[], parameters=[plan]), wanted)), count


def test_layers_of_different_codes_are_of_different_kinds() -> None:
    call = packed_call("llama", "q8_0", "s4-g32", "q8_0")
    assert layers_of(call["programs"], call["parameters"]).kinds == (0, 1, 0)


def test_a_handle_keeps_the_tensors_and_reads_what_they_hold() -> None:
    make = Make(torch.float32, "cpu", 0)
    call = packed_call("llama", "q8_0")
    before = run(call)[0]
    at = next(i for i, t in enumerate(call["parameters"]) if t is not None and t.dtype == torch.uint8)
    weight = random_packed(make, "q8_0", 64, 64)
    call["parameters"][at] = handle_of(weight)
    first = run(call)[0]
    weight.scale.mul_(2)
    assert not torch.equal(run(call)[0], first)
    assert not torch.equal(first, before)
    kept = weakref.ref(weight.codes.untyped_storage())
    del weight
    gc.collect()
    assert kept() is not None
    del call
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda make: random_packed(make, "q8_0", 64, 32), r"weight has shape \[64, 32\], expected \[N, 64\]"),
        (lambda make: random_packed(make, "q8_0", 48, 64), "48"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(change: Any, said: str) -> None:
    call = packed_call("llama", "q8_0")
    at = next(i for i, t in enumerate(call["parameters"]) if t is not None and t.dtype == torch.uint8)
    call["parameters"][at] = handle_of(change(Make(torch.float32, "cpu", 0)))
    for fn, error in ((layers_, ValueError), (NATIVE, RuntimeError)):
        with pytest.raises(error, match=said):
            fn(**call)


def test_what_the_kernels_do_not_read_goes_by_the_definition() -> None:
    """Rows from the middle of a panel, and scales in float64."""
    places = [*ROWS[:4], "gate_up[8:136]", "gate_up[128:256]", "down"]
    middle = packed_call("phi3", "q8_0") | {"programs": [llama(16, places=places)]}
    double = packed_call("llama", "q8_0")
    at = next(i for i, t in enumerate(double["parameters"]) if t is not None and t.dtype == torch.uint8)
    weight = random_packed(Make(torch.float32, "cpu", 0), "q8_0", 64, 64)
    double["parameters"][at] = handle_of(PackedWeight(weight.code, weight.n, weight.codes, weight.scale.double()))
    assert "scale is torch.float64" in str(dispatch.implementation("layers_", "cpu").why_not(**double))
    for call in (middle, double):
        assert torch.equal(run(call)[0], reference("layers_", call)[0])
