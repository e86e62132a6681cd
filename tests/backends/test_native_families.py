"""Which families' layers run natively: every program of tests/swap/families.md beside its definition."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import here, on
from test_native_programs import attempt
from torch import Tensor

from llmkern import _native, dispatch
from llmkern.ops import layers_
from llmkern.testing.case import Call, Make
from llmkern.testing.cases._families import FAMILIES
from llmkern.testing.cases._programs import call_of
from llmkern.testing.compare import upcast
from llmkern.testing.judge import cloned, reference

pytestmark = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))

TEXT = Path(__file__).parents[1] / "swap" / "families.md"
WRITTEN = dict(re.findall(r"^## (.+)\n\n(?:```\n)?((?:.|\n)*?)(?:\n```)?\n(?=\n##|\Z)", TEXT.read_text(), re.MULTILINE))
PROGRAMS = {name: text for name, text in WRITTEN.items() if text.startswith("layer(")}
LEFT = {
    "deberta-v2 encoder.layer.0": "attends by distances between contents, too",
    "deepseek-v3 layers.0": "compresses keys and values, and copies parts of them together",
    "mpt blocks.0": "fills a mask in itself",
}
"""Layers that no program is read off, and why."""
TURNED = tuple(re.findall(r"(?:attn|mlp)\.c_\w+", PROGRAMS["gpt2 h.0"]))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.fixture
def natively(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The op's native kernel, which may not hand the call to the reference."""

    def run(call: Call) -> list[Tensor]:
        caches = cloned(call["caches"])
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "implementation", lambda *_: pytest.fail("the reference was called"))
            return [torch.ops.llmkern.layers_(**(call | {"caches": caches})), *caches]

    return run


def test_every_layer_has_a_program_or_is_left() -> None:
    assert set(WRITTEN) - set(PROGRAMS) == set(LEFT)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_family(name: str, natively: Any) -> None:
    """Two layers: a prompt with padding, and a token after it, with the keys of an encoder's tokens kept."""
    make = Make(torch.float32, "cpu", 0)
    turned = TURNED if name == "gpt2 h.0" else ()
    for how in (
        {"queries": 3, "past": 2, "masked": True},
        {"queries": 1, "past": 5, "kept": "append" in PROGRAMS[name]},
    ):
        call = call_of(make, PROGRAMS[name], turned=turned, layers=2, **how)
        assert dispatch.implementation("layers_", "cpu").why_not(**call) is None
        exact = reference("layers_", upcast(call))
        for out, expected in zip(natively(call), exact, strict=True):
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sequence_does_not_depend_on_others(name: str, natively: Any) -> None:
    both = call_of(Make(torch.float32, "cpu", 0), FAMILIES[name], 2, 3, tokens=2)  # few rows, as `linear` has it
    heads = both["inputs"][-1].shape[0] // 2 if "alibi" in FAMILIES[name] else 0

    def own(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.shape[0] == 1:
            return tensor
        return tensor[:heads] if heads and tensor.shape[0] == 2 * heads else tensor[:1]

    first = both | {key: [own(t) for t in both[key]] for key in ("inputs", "caches")} | {"hidden": both["hidden"][:1]}
    for isa in here():
        with on(isa):
            for together, alone in zip(natively(both), natively(first), strict=True):
                assert torch.equal(together[:1], alone), isa


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3e38])
def test_a_row_whose_experts_cannot_be_chosen_stays_alone(value: float, natively: Any) -> None:
    for name in ("mixtral", "gpt-oss", "glm4-moe"):
        call = call_of(Make(torch.float32, "cpu", 0), FAMILIES[name], 1, experts=40)
        expected = natively(call)[0]
        call["hidden"][0, 0, 3] = value
        out = natively(call)[0]
        assert torch.equal(out[1], expected[1])
        assert not torch.equal(out[0], expected[0])


@pytest.mark.parametrize("wide", [False, True])
def test_logits_that_bf16_does_not_tell_apart(wide: bool, natively: Any) -> None:
    """The experts are as many as the columns, so that a layer returns a router's weights."""
    weight = torch.zeros(32, 32)
    weight[:, 0], weight[:, 1] = 100, torch.arange(32) * 2**-7
    program = f"layer(hidden)\n  r = route(hidden, router, top=1{', wide' * wide})\n  return r"
    for rows in (1, 40):
        call = {
            "hidden": torch.ones(1, rows, 32, dtype=torch.bfloat16),
            "programs": [program],
            "parameters": [weight.bfloat16(), None, None],
            "inputs": [],
            "caches": [],
            "past": 0,
            "schemes": "w8a8",
        }
        for isa in here():
            with on(isa):
                (out,) = natively(call)
                assert torch.equal(out, reference("layers_", call)[0]), isa
                assert bool((out.argmax(-1) == (31 if wide else 0)).all()), isa


CALLS = {name: call_of(Make(torch.float32, "cpu", 0), text, 2, 3) for name, text in FAMILIES.items()}
PIECES = sorted({piece for call in CALLS.values() for piece in re.findall(r"[\w.@]+|\S", call["programs"][0])})


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from([*CALLS]), at=st.integers(15, 700), pieces=st.lists(st.sampled_from(PIECES), max_size=3),
       cut=st.integers(0, 12))  # fmt: skip
def test_a_damaged_program_is_a_sentence_or_runs(name: str, at: int, pieces: list[str], cut: int) -> None:
    program = CALLS[name]["programs"][0]
    changed = program[:at] + " ".join(pieces) + program[at + cut :]
    out = attempt(CALLS[name] | {"programs": [changed], "caches": cloned(CALLS[name]["caches"])})
    assert out.shape == (2, 2, 32) if isinstance(out, Tensor) else out.strip()


def wrong(name: str, **how: Any) -> Call:
    return call_of(Make(torch.float32, "cpu", 0), FAMILIES[name], 2, 3, **how)


def without(call: Call, key: str, **changes: Any) -> Call:
    """The call with some of a list's elements, by their places, as others."""
    return call | {key: [changes.get(f"at{i}", each) for i, each in enumerate(call[key])]}


BAD: dict[str, tuple[Call, str]] = {
    "no tokens and no cache": (wrong("bart", kept=True, cached=False), "encoder is not given"),
    "kept keys of fewer tokens": (
        (call := wrong("bart")) | {"caches": [*call["caches"][:2], *[c[:, :, 1:] for c in call["caches"][2:]]]},
        r"kept keys.* has shape \[2, 2, 4, 8\]",
    ),
    "too few caches": (
        (call := wrong("bart")) | {"caches": call["caches"][:2]},
        "caches has 2 elements, expected none",
    ),
    "a bias of other heads": (
        without(wrong("t5"), "inputs", at1=torch.zeros(1, 3, 2, 5)),
        r"bias has shape \[1, 3, 2, 5\]",
    ),
    "a bias of fewer keys": (
        without(wrong("t5"), "inputs", at1=torch.zeros(1, 4, 2, 4)),
        r"bias has shape \[1, 4, 2, 4\]",
    ),
    "alibi of other heads": (
        without(wrong("bloom"), "inputs", at1=torch.zeros(6, 1, 5)),
        r"alibi has shape \[6, 1, 5\]",
    ),
    "a bias and slopes": (
        (call := wrong("bloom"))
        | {"programs": [call["programs"][0].replace("bias=", "slopes=@slopes, bias=")]}
        | {"parameters": [*call["parameters"][:5], torch.ones(4), *call["parameters"][5:]]},
        "it has a bias and slopes",
    ),
    "rows that do not divide": (
        without(wrong("gpt-neox"), "parameters", at2=torch.zeros(95, 32), at4=None),
        r"qkv\[0:8/24\]: weight has 95 rows, which are not of that form",
    ),
    "a correction of other experts": (
        without(wrong("glm4-moe"), "parameters", at17=torch.ones(3)),
        r"@added has shape \[3\]",
    ),
    "groups that do not divide": (
        (call := wrong("glm4-moe")) | {"programs": [call["programs"][0].replace("groups=2", "groups=3")]},
        "1 of 3 groups of 4 experts",
    ),
    "more experts than there are in the groups": (
        (call := wrong("glm4-moe")) | {"programs": [call["programs"][0].replace("top=2", "top=3")]},
        "top is 3, expected at most 2|top is 3, expected 1 to 2",
    ),
    "a factor of other columns": (
        without(wrong("dinov2"), "parameters", at14=torch.zeros(31)),
        r"@scale1 has shape \[31\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_a_sentence_and_changes_nothing(name: str) -> None:
    call, said = BAD[name]
    before = cloned(call["caches"])
    for run, error in ((layers_, (ValueError, TypeError)), (torch.ops.llmkern.layers_, RuntimeError)):
        with pytest.raises(error, match=said):
            run(**call)
    assert all(map(torch.equal, before, call["caches"]))
