"""decoder_layers_: the bits of one decoder_layer_ after the other, for any number of threads."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from instruction_sets import here, on
from torch import Tensor

from llmkern import _native
from llmkern.testing.case import Call, Case, cases

pytestmark = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))

LAYER = torch.ops.llmkern.decoder_layer_.default
NAMES = [argument.name for argument in LAYER._schema.arguments]
CACHES = NAMES[NAMES.index("k_cache") : NAMES.index("past")]
PARAMETERS = NAMES[NAMES.index("input_norm") : NAMES.index("head_dim")]
NUMBERS = NAMES[NAMES.index("head_dim") : NAMES.index("scheme")]
KINDS = ("decode", "continued", "smollm2", "qwen3", "no-cache", "40-tokens", "left-padding", "int8-w8a8", "int8-w8a16")
KINDS += ("int8-schemes", "int8-but-down", "int8-cache-continued", "0-batch")
CHOSEN = [case for case in cases("decoder_layer_") if case.name in KINDS]
DECODE = next(case for case in CHOSEN if str(case) == "decode-float32")
each_case = pytest.mark.parametrize("case", CHOSEN, ids=str)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def layers(case: Case, count: int = 3) -> list[Call]:
    """Calls that differ in their tensors, but for what is one for all layers."""
    calls = [case.make(seed=i) for i in range(count)]
    same = ("hidden", "cos", "sin", "mask")
    return [call | {name: calls[0][name] for name in same} for call in calls]


def plan_of(calls: list[Call]) -> Tensor:
    return torch.ops.llmkern.decoder_plan([call[name] for call in calls for name in PARAMETERS])


def together(calls: list[Call], plan: Tensor, scheme: str | None = None) -> Tensor:
    first = calls[0]
    caches = [call[name] for call in calls for name in CACHES if call[name] is not None]
    out: Tensor = torch.ops.llmkern.decoder_layers_(
        *[first[name] for name in ("hidden", "cos", "sin")],
        caches,
        first["past"],
        first["mask"],
        plan,
        *[first[name] for name in NUMBERS],
        first["scheme"] if scheme is None else scheme,
    )
    return out


def one_by_one(calls: list[Call], schemes: list[str] | None = None) -> Tensor:
    hidden = calls[0]["hidden"]
    for i, call in enumerate(calls):
        hidden = LAYER(**call | {"hidden": hidden} | ({"scheme": schemes[i]} if schemes else {}))
    return hidden


def assert_same(case: Case, expected: list[Call], calls: list[Call], wanted: Tensor, out: Tensor) -> None:
    assert torch.equal(out, wanted), case
    for theirs, ours in zip(expected, calls, strict=True):
        for name in CACHES:
            assert ours[name] is None or torch.equal(ours[name], theirs[name]), name


@each_case
@torch.no_grad()
def test_the_bits_are_those_of_one_layer_after_the_other(case: Case) -> None:
    for isa in here():
        with on(isa):
            expected, calls = layers(case), layers(case)
            wanted = one_by_one(expected)
            assert_same(case, expected, calls, wanted, together(calls, plan_of(calls)))


@each_case
@torch.no_grad()
def test_the_bits_are_the_same_on_any_number_of_threads(case: Case) -> None:
    """More threads than cores, too, and more often than a thread that is late could hide."""
    torch.set_num_threads(1)
    expected = layers(case)
    wanted = one_by_one(expected)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        for _ in range(5):
            calls = layers(case)
            assert_same(case, expected, calls, wanted, together(calls, plan_of(calls)))


@torch.no_grad()
def test_each_layer_has_its_schemes() -> None:
    case = next(case for case in CHOSEN if case.name == "int8-w8a8" and case.dtype == torch.float32)
    schemes = ["w8a16", "w8a8", "w8a8,w8a16,w8a8,w8a8,w8a8,w8a16,w8a16"]
    expected, calls = layers(case), layers(case)
    wanted = one_by_one(expected, schemes)
    assert_same(case, expected, calls, wanted, together(calls, plan_of(calls), ";".join(schemes)))
    assert not torch.equal(wanted, together(layers(case), plan_of(calls)))


@torch.no_grad()
def test_a_plan_keeps_the_tensors_and_reads_what_they_hold() -> None:
    calls = layers(DECODE)
    plan = plan_of(calls)
    kept = [weakref.ref(call["q_weight"].untyped_storage()) for call in calls]
    for call in calls:
        call["down_weight"].mul_(2)
        call["up_weight"].data = call["up_weight"] * 3
    expected = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in call.items()} for call in calls]
    assert torch.equal(together(calls, plan), one_by_one(expected))
    other = layers(DECODE)
    del calls, call
    gc.collect()
    together(other, plan)
    del plan
    gc.collect()
    assert all(ref() is None for ref in kept)


def broken(**changes: Any) -> tuple[list[Call], Tensor]:
    calls = layers(DECODE)
    plan = changes.pop("plan", None)
    return [call | changes for call in calls], plan_of(calls) if plan is None else plan


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plan": torch.zeros(1, dtype=torch.uint8)}, "plan is not one that decoder_plan has made"),
        ({"v_cache": None}, "caches has 3 elements, expected 0, 2 or 4 for each of 3 layers"),
        ({"scheme": "w8a8;w8a8"}, "scheme is for 2 layers, expected 1 or 3"),
        ({"activation": "mish"}, "the kernels do not take these types, or this activation"),
        ({"hidden": torch.zeros(1, 1, 24, dtype=torch.float64)}, "the kernels do not take these types"),
        ({"past": 1000}, "caches must have shape"),
    ],
)
@torch.no_grad()
def test_what_cannot_be_read_is_an_error(changes: dict[str, Any], said: str) -> None:
    calls, plan = broken(**changes)
    with pytest.raises(RuntimeError, match=said):
        together(calls, plan)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ([torch.zeros(1)] * 26, "parameters has 26 elements, expected 25 for each layer"),
        ([None] * 24 + [torch.zeros(1)], "layer 0 lacks its parameter number 0"),
    ],
)
def test_a_plan_needs_whole_layers(parameters: list[Tensor | None], said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        torch.ops.llmkern.decoder_plan(parameters)
