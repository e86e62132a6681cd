"""layers_ natively: programs of any text, threads, plans, and the sentences for what cannot be read."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import here, on
from torch import Tensor

from llmkern import _native
from llmkern.ops import layers_
from llmkern.ops._layer_plan import layers_of, plan_layers
from llmkern.testing.case import Call, Case, Make, cases
from llmkern.testing.cases.layers_ import decoder, llama, text
from llmkern.testing.judge import cloned

pytestmark = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))

NATIVE = torch.ops.llmkern.layers_
KINDS = ("3-layers", "continued", "smollm2", "qwen3", "no-cache", "40-tokens", "left-padding", "int8-w8a8", "minilm")
KINDS += ("int8-schemes-of-layers", "int8-but-down", "int8-cache-continued", "bert-2-layers", "0-batch", "phi3")
KINDS += (
    "gpt-neox-19-tokens",
    "bart-kept",
    "t5-masked",
    "bloom-int8",
    "granite-masked",
    "gpt2-masked",
    "mixtral-19-tokens",
    "gpt-oss-masked",
)
CHOSEN = [case for case in cases("layers_") if case.name in KINDS]
each_case = pytest.mark.parametrize("case", CHOSEN, ids=str)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def run(call: Call, **changes: Any) -> list[Tensor]:
    """The result and the caches, which the call keeps as they are."""
    caches = cloned(call["caches"])
    return [NATIVE(**(call | {"caches": caches} | changes)), *caches]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def one_by_one(call: Call) -> list[Tensor]:
    """As many calls as there are layers."""
    layers = layers_of(call["programs"], call["parameters"]).each
    schemes = call["schemes"].split(";")
    caches, hidden = cloned(call["caches"]), call["hidden"]
    held = len(caches) // len(layers)
    for i, layer in enumerate(layers):
        alone = {"hidden": hidden, "parameters": layer.tensors, "caches": caches[held * i : held * (i + 1)]}
        hidden = NATIVE(**(call | alone | {"schemes": schemes[i if len(schemes) > 1 else 0]}))
    return [hidden, *caches]


@each_case
def test_the_bits_are_those_of_one_layer_after_the_other(case: Case) -> None:
    call = case.make()
    for isa in here():
        with on(isa):
            assert same(run(call), one_by_one(call)), isa


@each_case
def test_the_bits_are_the_same_on_any_number_of_threads(case: Case) -> None:
    """More threads than cores, too, and more often than a thread that is late could hide."""
    call = case.make()
    torch.set_num_threads(1)
    wanted = run(call)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        assert all([same(run(call), wanted) for _ in range(5)]), count


@each_case
def test_a_plan_gives_the_same_bits(case: Case) -> None:
    call = case.make()
    plan = plan_layers(call["programs"], call["parameters"])
    for programs in ([], call["programs"]):
        assert same(run(call, programs=programs, parameters=[plan]), run(call))
    before = [tensor if tensor is None else tensor.clone() for tensor in call["parameters"]]
    assert torch.equal(layers_(**(call | {"caches": cloned(call["caches"]), "parameters": [plan]})), run(call)[0])
    assert all([a is None or torch.equal(a, b) for a, b in zip(before, call["parameters"], strict=True)])


def test_a_plan_keeps_the_tensors_and_reads_what_they_hold() -> None:
    call = decoder(Make(torch.float32, "cpu", 0), 1, 4, layers=2)
    plan = plan_layers(call["programs"], call["parameters"])
    weights = [tensor for tensor in call["parameters"] if tensor is not None]
    weights[1].mul_(2)
    weights[2].data = weights[2] * 3
    assert same(run(call, programs=[], parameters=[plan]), run(call))
    kept = [weakref.ref(tensor.untyped_storage()) for tensor in weights]
    del call, weights
    gc.collect()
    assert all([ref() is not None for ref in kept])
    del plan
    gc.collect()
    assert all([ref() is None for ref in kept])


def test_layers_of_different_programs() -> None:
    make = Make(torch.float32, "cpu", 0)
    call = decoder(make, 3, 7, layers=2)
    programs = [call["programs"][0], llama(8, window=4)]
    together = run(call, programs=programs)
    layers = layers_of(call["programs"], call["parameters"]).each
    first = run(call, parameters=layers[0].tensors, caches=call["caches"][:2])
    caches = cloned(call["caches"][2:])
    second = NATIVE(**(call | {"hidden": first[0], "programs": programs[1:], "parameters": layers[1].tensors})
                    | {"caches": caches})  # fmt: skip
    assert torch.equal(together[0], second)


def changed(path: str, part: int, change: Callable[[Tensor], Tensor | None]) -> list[Tensor | None]:
    """A layer's parameters, one of them another."""
    call = decoder(Make(torch.float32, "cpu", 0), 1, 4, biases=("q",))
    (layer,) = layers_of(call["programs"], call["parameters"]).each
    first = 0
    for parameter in layer.program.parameters():
        if parameter.path == path:
            break
        first += {"linear": 3, "norm": 2, "tensor": 1}[parameter.kind]
    tensors = list(layer.tensors)
    tensors[first + part] = change(tensors[first + part])  # type: ignore[arg-type]
    return tensors


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"past": 1000}, "the cache of keys has shape"),
        ({"past": -1}, "past is -1"),
        ({"caches": []}, "past is 4, expected 0 where there is no cache"),
        ({"caches": [torch.zeros(1, 2, 9, 8)]}, "caches has 1 elements, expected none, or 2 or 4"),
        ({"inputs": [torch.zeros(1, 1, 8)]}, "inputs has 1 elements, expected 3"),
        ({"inputs": [torch.zeros(1, 1, 6), torch.zeros(1, 1, 6), None]}, r"cos has shape \[1, 1, 6\], expected"),
        ({"inputs": [torch.zeros(1, 1, 8)] * 2 + [torch.zeros(3, 1, 1, 1)]}, r"mask has shape \[3, 1, 1, 1\]"),
        ({"schemes": "w8a8,w8a8"}, "schemes has 2 parts, expected 1 or 7"),
        ({"schemes": "w8a8;w8a8"}, "schemes is for 2 layers, expected 1 or 1"),
        ({"schemes": "w4a4"}, "schemes has a part that is neither w8a8 nor w8a16"),
        ({"programs": []}, "programs has 0 elements"),
        ({"parameters": []}, "parameters has 0 elements, expected 25 for each layer"),
        ({"parameters": changed("down", 0, lambda w: w[:, 1:])}, r"down: weight has shape \[24, 39\], expected \[N, 4"),
        ({"parameters": changed("down", 0, lambda w: w[1:])}, "down: weight has 23 rows, expected 24, the columns of"),
        ({"parameters": changed("up", 0, lambda w: w[1:])}, "gate and up make 40 and 39 columns"),
        ({"parameters": changed("k", 0, lambda w: w[1:])}, "have 32, 15 and 16 columns|k has 15 columns"),
        ({"parameters": changed("k", 0, lambda w: None)}, "k: weight is not given"),
        ({"parameters": changed("q", 2, lambda b: b[1:])}, r"q: bias has shape \[31\], expected \[32\]"),
        ({"parameters": changed("q", 1, lambda _: torch.ones(32, 1))}, "q: scale goes with a weight of int8"),
        ({"parameters": changed("post_norm", 0, lambda w: w[1:])}, r"post_norm: weight has shape \[23\], expected \[2"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_a_sentence_and_changes_nothing(changes: dict[str, Any], said: str) -> None:
    call = decoder(Make(torch.float32, "cpu", 0), 1, 4, biases=("q",))
    before = cloned(call["caches"])
    with pytest.raises(RuntimeError, match=said):
        NATIVE(**(call | changes))
    assert same(before, call["caches"])


def test_a_later_layer_that_cannot_be_read_leaves_the_caches_as_they_were() -> None:
    call = decoder(Make(torch.float32, "cpu", 0), 1, 4, layers=3)
    call["parameters"][-3] = call["parameters"][-3][:, 1:]
    before = cloned(call["caches"])
    with pytest.raises(RuntimeError, match=r"down: weight has shape \[24, 39\], expected \[N, 40\].*\(layer 2\)"):
        NATIVE(**call)
    assert same(before, call["caches"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("x = mish(hidden)", "there is no operator mish"),
        ("x = rms_norm(hidden, n)", "eps is not given"),
        ("x = rms_norm(hidden, n, eps=1e-6, loud)", "stands behind an option"),
        ("x = rms_norm(hidden, n, eps=1e-6, causal=1)", "there is no option causal"),
        ("x = rms_norm(hidden, n, eps=6)", "eps is 6, expected a number with a point or an exponent"),
        ("x = rms_norm(hidden, n, eps=1e999)", "eps is 1e999, expected a number"),
        ("x = linear(hidden, a[3:2])", "there are no such rows"),
        ("x = linear(hidden, a[0:99999999999999999999])", "is neither a value nor a place"),
        ("x, y = linear(hidden, a)", "2 results, expected 1"),
        ("x = linear(nobody, a)", "0 values, expected 1 to 1"),
        ("x = linear(hidden, a, activation=mish)", "there is no activation mish"),
        ("x = linear(hidden, a, activation=swiglu)", "a gate takes 2 places"),
        ("x = linear(hidden, a, residual=nobody)", "there is no value nobody"),
        ("x = attention(hidden, hidden, hidden, dim=4, scale=0.5, window=4, causal)", "out of order"),
        ("x = linear hidden", r"expected names = operator\(arguments\)"),
    ],
)
def test_a_wrong_line_is_named(line: str, said: str) -> None:
    program = f"layer(hidden)\n{line}\nreturn hidden"
    with pytest.raises(RuntimeError, match=f"line 2: .*{said}"):
        NATIVE(torch.zeros(1, 1, 4), [program], [], [], [], 0, "w8a8")


PIECES = st.sampled_from(
    [*llama(8).replace("\n", " \n ").split(" "), "(", ")", ",", "=", "[", "]", ":", "/", "@", "1", "-1", "0", "dim=0"]
)
TEXTS = st.one_of(
    st.text(max_size=200),
    st.lists(PIECES, max_size=40).map(" ".join),
    st.lists(PIECES, max_size=12).map(lambda pieces: f"layer(hidden)\n{' '.join(pieces)}\nreturn hidden"),
)


def attempt(call: Call) -> Tensor | str:
    """The result, or the sentence why there is none."""
    try:
        out: Tensor = NATIVE(**call)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return out


@settings(max_examples=400, deadline=None)
@given(program=TEXTS)
def test_any_text_is_a_sentence_or_runs(program: str) -> None:
    call = {"parameters": [], "inputs": [], "caches": [], "past": 0, "schemes": "w8a8"}
    out = attempt({"hidden": torch.ones(1, 2, 8), "programs": [program], **call})
    assert out.shape == (1, 2, 8) if isinstance(out, Tensor) else out.strip()


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 400), piece=st.one_of(PIECES, st.text(max_size=3)), cut=st.integers(0, 12))
def test_a_damaged_program_is_a_sentence_or_runs(at: int, piece: str, cut: int) -> None:
    call = decoder(Make(torch.float32, "cpu", 0), 2, 3)
    program = call["programs"][0]
    out = attempt(call | {"programs": [program[:at] + piece + program[at + cut :]]})
    assert out.shape == (1, 2, 24) if isinstance(out, Tensor) else out.strip()


def test_a_program_of_no_steps_returns_a_copy() -> None:
    hidden = torch.randn(2, 3, 4)
    out = NATIVE(hidden, [text("hidden", [])], [], [], [], 0, "w8a8")
    assert torch.equal(out, hidden)
    assert out.data_ptr() != hidden.data_ptr()
