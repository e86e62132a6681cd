"""Properties that users of such libraries find broken again and again, over all ops and every backend here.

A few examples of each in CI, always the same; `make fuzz` draws a hundred times as many, others each time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, expanded
from torch import Tensor
from torch.utils._pytree import tree_map_only

from llmkern import _native, dispatch, ops
from llmkern.dispatch import Implementation
from llmkern.testing.case import Call, Case, Make, cases, ops_with_cases
from llmkern.testing.cases.attention import random_call
from llmkern.testing.compare import as_list, assert_same_bits, upcast
from llmkern.testing.judge import assert_accurate, assert_right, reference, written

OPS = ops_with_cases()
WITH_GRADIENT = [op for op in OPS if cases(op)[0].differentiable]


FACTOR = settings.default.max_examples // 100
"""How many times as many examples as in CI: by the profile in use, against hypothesis' own."""


def examples(count: int) -> Callable[[Any], Any]:
    """So many examples in CI."""
    return settings(
        max_examples=count * FACTOR,
        derandomize=FACTOR == 1,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


def tensors(call: Call) -> dict[str, Tensor]:
    return {name: value for name, value in call.items() if isinstance(value, Tensor)}


def serving(op: str, call: Call) -> Iterator[Implementation]:
    """Each implementation that serves the call on this machine, interpreters too.

    Pallas's, whose every call takes seconds to compile, is left to `make fuzz`.
    """
    for impl in dispatch.implementations(op):
        with dispatch.use_backend(impl.backend.name):  # some serve only where they are asked for
            able = (FACTOR > 1 or impl.backend.name != "tpu") and impl.why_not(**call) is None
        if able:
            yield impl


def drawn(data: st.DataObject, op: str, call: Call) -> Implementation:
    """One that serves the call."""
    return data.draw(st.sampled_from(list(serving(op, call))), label="implementation")


def names_of(op: str) -> list[str]:
    """The backends that have the op."""
    names = dict.fromkeys(impl.backend.name for impl in dispatch.implementations(op))
    return [name for name in names if FACTOR > 1 or name != "tpu"]


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
@examples(3)
def test_any_layout_of_the_inputs(op: str, layout: Callable[[Tensor], Tensor], data: st.DataObject) -> None:
    """Right by the case's rule, whichever inputs are laid out so.  Interpreters have their turn in `make fuzz`."""
    case = data.draw(st.sampled_from(cases(op)[1:]))  # the first tends to be of one element
    call = case.make()
    for name, value in tensors(call).items():
        repeated = layout is expanded and (name in written(op) or not value.is_floating_point())
        if not repeated and data.draw(st.sampled_from((True, True, False)), label=name):
            call[name] = layout(value)
    for impl in serving(op, call):
        if FACTOR > 1 or impl.backend.name != "triton":
            again = call | {
                name: tree_map_only(Tensor, Tensor.clone, call[name]) for name in written(op) if call[name] is not None
            }
            before = {name: value.clone() for name, value in tensors(call).items() if name not in written(op)}
            assert_right(case, again, impl.fn(**again))
            assert_same_bits([call[name] for name in before], list(before.values()))


@pytest.mark.parametrize("op", WITH_GRADIENT)
@given(data=st.data())
@examples(4)
def test_any_layout_of_the_incoming_gradients(op: str, data: st.DataObject) -> None:
    """Gradients are those of the same incoming gradients laid out contiguously."""
    case = data.draw(st.sampled_from([case for case in cases(op) if case.differentiable]))
    call = {
        k: v.requires_grad_() if k in case.differentiable and isinstance(v, Tensor) else v
        for k, v in case.make().items()
    }
    name = data.draw(st.sampled_from(names_of(op)), label="backend")
    with dispatch.use_backend(name):
        try:
            outputs = [o for o in as_list(getattr(torch.ops.llmkern, op)(**call)) if o.requires_grad]
            inputs = [v for v in tensors(call).values() if v.requires_grad]
            incoming = [data.draw(st.sampled_from(LAYOUTS))(torch.randn_like(o)) for o in outputs]
            got = torch.autograd.grad(outputs, inputs, incoming, retain_graph=True)
            want = torch.autograd.grad(outputs, inputs, [i.contiguous() for i in incoming])
        except dispatch.Refused:
            assume(False)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


# Arguments: whatever is accepted counts.

CHOICES: dict[str, tuple[Any, ...]] = {
    "activation": ops.int8_matmul.__globals__["ACTIVATIONS"],
    "approximate": ("none", "tanh"),
    "causal": (False, True),
    "eps": (1e-6, 0.3),
    "interleaved": (False, True),
    "return_lse": (False, True),
    "sm_scale": (0.1, 0.9),
    "softcap": (0.0, 0.5, 4.0),
    "weight_offset": (0.0, 1.0),
    "window": ([-1, -1], [0, 0], [2, 1], [3, -1], [-1, 0]),
}
FREE = ("weight", "bias", "residual", "attn_mask", "key_padding_mask", "sinks")  # may be absent by themselves
LAYERS = ("layers_",)  # whose arguments hang together; its cases have each of them


def changes(op: str, call: Call) -> dict[str, list[Any]]:
    """For each argument that may be changed by itself, its values."""
    found: dict[str, list[Any]] = {}
    for argument in getattr(torch.ops.llmkern, op).default._schema.arguments if op not in LAYERS else ():
        name = argument.name
        if name in CHOICES:
            found[name] = list(CHOICES[name])
        elif name in FREE and str(argument.type) == "Optional[Tensor]" and call[name] is not None:
            found[name] = [call[name], None]
    return found


@pytest.mark.parametrize("op", [op for op in OPS if changes(op, cases(op)[0].make())])
@given(data=st.data())
@examples(6)
def test_any_combination_of_flags(op: str, data: st.DataObject) -> None:
    """Whatever combination an implementation accepts, it is right: nothing is accepted and ignored."""
    case = data.draw(st.sampled_from([case for case in cases(op) if case.rule == "accuracy"] or cases(op)))
    call = case.make()
    for name, values in changes(op, call).items():
        call[name] = data.draw(st.sampled_from(values), label=name)
    impl = drawn(data, op, call)
    assert_right(case, call, impl.fn(**call))


def flags() -> list:
    """Each op with each of its arguments that may be changed."""
    return [
        pytest.param(op, name, id=f"{op}-{name}")
        for op in OPS
        for name in sorted(
            {name for case in cases(op) if case.dtype == torch.float32 for name in changes(op, case.make())}
        )
    ]


def telling(op: str, name: str) -> tuple[Call, Call]:
    """Two calls that differ in this argument, and by the definition in their results."""
    for case in [case for case in cases(op) if case.dtype == torch.float32]:
        call = case.make()
        plain = {"window": [-1, -1], "softcap": 0.0, "causal": False}
        call |= {key: value for key, value in plain.items() if key in call}
        for value in changes(op, call).get(name, []):
            if differ(reference(op, call), reference(op, other := call | {name: value})):
                return call, other
    raise AssertionError(f"no case of {op} tells the values of {name} apart")


def differ(one: Any, other: Any) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(as_list(one), as_list(other), strict=True))


@pytest.mark.parametrize(("op", "name"), flags())
def test_every_flag_changes_the_output(op: str, name: str) -> None:
    """On each implementation that takes both values."""
    one, other = telling(op, name)
    both = [impl for impl in serving(op, one) if impl in list(serving(op, other))]
    assert both
    for impl in both:
        assert differ(impl.fn(**one), impl.fn(**other)), impl.backend.name


# Attention: what a row sees.


@st.composite
def masked_calls(draw: st.DrawFn) -> Call:
    """Self- and cross-attention with random masks of every form, rows that see nothing among them."""
    make = Make(torch.float32, "cpu", draw(st.integers(0, 2**16)))
    queries, keys = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    call = random_call(make, queries, keys, batch=2, heads=(4, 2))
    call["causal"] = draw(st.booleans())
    call["window"] = draw(st.sampled_from(CHOICES["window"]))
    form = draw(st.sampled_from(("none", "bool", "infinite", "padding")))
    visible = make.randn(2, 1, queries, keys) > 0.3
    if form == "bool":
        call["attn_mask"] = visible
    elif form == "infinite":
        call["attn_mask"] = make.randn(2, 1, queries, keys, scale=0.0).masked_fill(~visible, -math.inf)
    elif form == "padding":
        call["key_padding_mask"] = visible[:, 0, 0]
    return call


def blind_rows(call: Call) -> Tensor:
    """The rows [B, Hq, Sq] that see no key: by the log-sum-exp of the definition in float64."""
    _, lse = reference("attention", upcast(call) | {"return_lse": True})
    return lse == -math.inf


@given(call=masked_calls(), data=st.data())
@examples(30)
def test_a_row_that_sees_nothing_is_zero_and_has_finite_gradients(call: Call, data: st.DataObject) -> None:
    blind = blind_rows(call)
    name = data.draw(st.sampled_from(names_of("attention")), label="backend")
    inputs = [call[name].requires_grad_() for name in ("q", "k", "v")]
    with dispatch.use_backend(name):
        try:
            out, _ = torch.ops.llmkern.attention(**call)
            assert bool((out[blind] == 0).all())
            dq, dk, dv = torch.autograd.grad(out, inputs, torch.randn_like(out))
        except dispatch.Refused:
            with torch.no_grad():
                assume(next((i for i in serving("attention", call) if i.backend.name == name), None) is not None)
                out, _ = torch.ops.llmkern.attention(**call)
            assert bool((out[blind] == 0).all())
            return
    assert bool((dq[blind] == 0).all())
    assert all(bool(gradient.isfinite().all()) for gradient in (dq, dk, dv))


@given(data=st.data())
@examples(20)
def test_several_sequences_in_one_are_each_by_itself(data: st.DataObject) -> None:
    """Packed with a mask of blocks, sequences neither see each other nor change by more than rounding."""
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=4))
    window = data.draw(st.sampled_from(([-1, -1], [2, 0])))
    total, call = sum(lengths), random_call(Make(torch.float32, "cpu", 0), sum(lengths), sum(lengths), heads=(4, 2))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    call |= {"causal": True, "window": window, "attn_mask": (document[:, None] == document)[None, None]}
    impl = drawn(data, "attention", call)
    packed, _ = impl.fn(**call)
    assert_accurate("attention", call, impl.fn(**call))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for start, length in zip(starts, lengths, strict=True):
        alone = {name: call[name][:, :, start : start + length] for name in ("q", "k", "v")}
        expected, _ = reference("attention", upcast(call | alone | {"attn_mask": None}))
        torch.testing.assert_close(packed[:, :, start : start + length].double(), expected, rtol=1e-5, atol=1e-5)
    assert total == packed.shape[2]


@given(data=st.data())
@examples(20)
def test_a_prompt_and_steps_are_one_pass_at_the_edges_of_a_window(data: st.DataObject) -> None:
    """Each token by attention_decode over a cache whose other slots hold NaN is its row of one causal pass."""
    window = data.draw(st.integers(1, 8), label="window")
    length = max(1, window + data.draw(st.integers(-1, 1), label="beyond"))
    make = Make(torch.float32, "cpu", data.draw(st.integers(0, 99)))
    call = random_call(make, length, length, batch=2, heads=(4, 2)) | {"causal": True, "window": [window - 1, 0]}
    sinks = make.randn(4) if data.draw(st.booleans(), label="sinks") else None
    expected, _ = reference("attention", upcast(call | {"sinks": sinks}))
    queries = data.draw(st.integers(1, length), label="tokens at a time")
    step: Call = {name: call[name] for name in ("sm_scale", "softcap", "return_lse")}
    step |= {"window": call["window"], "block_table": None, "k_scale": None, "v_scale": None, "sinks": sinks}
    for end in range(length, 0, -queries):
        rows = slice(max(0, end - queries), end)
        k, v = (padded_cache(call[name], end) for name in ("k", "v"))
        step |= {"q": call["q"][:, :, rows], "k_cache": k, "v_cache": v, "seq_lens": torch.tensor([end, end])}
        for impl in serving("attention_decode", step):
            out, _ = impl.fn(**step)
            torch.testing.assert_close(out.double(), expected[:, :, rows], rtol=1e-5, atol=1e-5)
    for impl in serving("attention", call | {"sinks": sinks}):
        out, _ = impl.fn(**call | {"sinks": sinks})
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def padded_cache(x: Tensor, length: int) -> Tensor:
    """A cache of twelve slots with the first `length` of x; the others hold NaN."""
    cache = x.new_full((*x.shape[:2], 12, x.shape[3]), math.nan)
    cache[:, :, :length] = x[:, :, :length]
    return cache


# Rows and sequences.

ROWS = {  # the arguments whose rows or sequences lie along the first dimension
    **{op: ("x", "residual") for op in OPS if "norm" in op},
    "attention": ("q", "k", "v", "attn_mask", "key_padding_mask"),
    "attention_decode": ("q", "k_cache", "v_cache", "seq_lens", "block_table", "k_scale", "v_scale"),
    "gelu": ("x",),
    "int8_linear": ("x",),
    "linear": ("x",),
    "quantize_int8": ("x",),
    "rope": ("q", "k", "cos", "sin"),
    "swiglu": ("gate", "up"),
    "swiglu_quant": ("gate", "up"),
}


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    _native.set_batch_invariant(True)
    try:
        yield
    finally:
        _native.set_batch_invariant(False)


@pytest.mark.parametrize("op", ROWS)
@given(data=st.data())
@examples(4)
def test_permuting_the_batch_permutes_the_output(op: str, data: st.DataObject) -> None:
    """To the bit, by whatever promises that a row's bits do not depend on the rows beside it."""
    case = data.draw(st.sampled_from(cases(op)))
    call = case.make()
    along = [name for name in ROWS[op] if isinstance(call.get(name), Tensor)]
    if op == "attention_decode" and call["block_table"] is not None:
        along = ["q", "seq_lens", "block_table"]
    batch = call[along[0]].shape[0] if call[along[0]].dim() > 1 else 1
    assume(batch > 1 and not any(bool(v.isnan().any()) for v in tensors(call).values()))
    order = torch.tensor(data.draw(st.permutations(range(batch))))
    other = call | {name: call[name][order] for name in along if call[name].shape[0] == batch}
    with batch_invariant():
        assume(list(serving(op, call)))  # nobody may promise it for this call
        impl = drawn(data, op, call)
        assert_same_bits([o[order] if o.numel() else o for o in as_list(impl.fn(**call))], impl.fn(**other))


# Sizes past 2³¹.


def far(x: Tensor, dim: int) -> Tensor:
    """A copy of `x` whose last element along `dim` lies 2³¹ elements behind its first; untouched pages cost nothing."""
    strides = list(x.contiguous().stride())
    strides[dim] = 2**31 // (x.shape[dim] - 1) + 1
    return torch.empty(2**31 + 2 * x.numel(), dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


def far_calls() -> list:
    """Each op's second case in bf16 with each tensor of at most two bytes an element, and each of its dimensions."""
    found = []
    for op in [op for op in OPS if op not in LAYERS]:
        case = [case for case in cases(op) if case.dtype == torch.bfloat16][1]
        for name, value in tensors(case.make()).items():
            if value.element_size() <= 2:
                dims = [dim for dim in range(value.dim()) if value.shape[dim] > 1]
                found += [pytest.param(case, name, dim, id=f"{op}-{name}-{dim}") for dim in dims]
    return found


@pytest.mark.parametrize(("case", "name", "dim"), far_calls())
def test_offsets_have_64_bits(case: Case, name: str, dim: int) -> None:
    """One tensor's elements lie 2³¹ elements apart, and every backend that takes that is right."""
    call = case.make()
    call[name] = far(call[name], dim)
    for impl in serving(case.op, call):
        assert_right(case, call, impl.fn(**call))
