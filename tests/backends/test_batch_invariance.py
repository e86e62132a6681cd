"""Batch invariance: row i of many has the bits that it has alone, of every implementation that promises it.

The numbers of rows are those at which kernels change: from few to many, from one block to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from instruction_sets import here, on
from torch import Tensor

from llmkern import _native, dispatch, explain, ops
from llmkern.config import reload, settings
from llmkern.testing.case import Make
from llmkern.testing.cases.layers_ import decoder
from llmkern.testing.cases.quantized_linear import random_packed
from llmkern.testing.compare import as_list, assert_same_bits

ROWS = (1, 2, 4, 8, 16, 17, 64)
MOST = ROWS[-1]
HIDDEN, OUT = 173, 77  # neither is a multiple of any register

Call = dict[str, Any]
built = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))


def norm(make: Make, residual: bool = False, offset: bool = False) -> Call:
    call = {"x": make.randn(MOST, HIDDEN), "weight": make.randn(HIDDEN), "bias": make.randn(HIDDEN), "eps": 1e-5}
    call |= {"residual": make.randn(MOST, HIDDEN)} if residual else {}
    return call | ({"weight_offset": 1.0} if offset else {})


def codes(make: Make, *shape: int) -> Tensor:
    return make.randint(-128, 128, *shape, dtype=torch.int8)


def gated(make: Make) -> Call:
    return {"gate": make.randn(MOST, HIDDEN), "up": make.randn(MOST, HIDDEN)}


def int8_linear(make: Make, scheme: str) -> Call:
    w_scale = make.randn(OUT, 1, dtype=torch.float32)
    weight = {"w_q": codes(make, OUT, HIDDEN), "w_scale": w_scale, "bias": make.randn(OUT)}
    return {"x": make.randn(MOST, HIDDEN), **weight, "activation": "gelu", "scheme": scheme}


def int8_matmul(make: Make) -> Call:
    scales = {name: make.randn(n, 1, dtype=torch.float32) for name, n in (("a_scale", MOST), ("w_scale", OUT))}
    call = {"a_q": codes(make, MOST, HIDDEN), "w_q": codes(make, OUT, HIDDEN), **scales}
    return call | {"bias": None, "residual": make.randn(MOST, OUT), "activation": "silu", "out_dtype": torch.float32}


def cross_entropy(make: Make) -> Call:
    numbers = {"ignore_index": -100, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "reduction": "none"}
    return {"logits": make.randn(MOST, HIDDEN), "labels": torch.arange(MOST), "weight": None, **numbers}


def quantized_linear(make: Make, kind: str) -> Call:
    packed = random_packed(make, kind, OUT, 768)
    groups = {name: packed.tensors.get(name) for name in ("zero", "offset", "super_scale", "super_offset")}
    weight = {"codes": packed.codes, "scale": packed.scale, **groups, "code": packed.code, "n": OUT}
    call = {"x": make.randn(MOST, 768), **weight, "bias": make.randn(OUT), "residual": make.randn(MOST, OUT)}
    return call | {"activation": "gelu", "scheme": "a8"}


def rope(make: Make) -> Call:
    angles = {"cos": make.randn(1, 3, 32), "sin": make.randn(1, 3, 32), "rotary_dim": 32, "interleaved": False}
    return {"q": make.randn(MOST, 4, 3, 32), "k": make.randn(MOST, 2, 3, 32), **angles}


SOFTMAX = {"sinks": None, "sm_scale": 0.2, "window": [-1, -1], "softcap": 0.0, "return_lse": True}


def attention(make: Make, queries: int = 5) -> Call:
    q, k, v = (make.randn(MOST, heads, queries, 32) for heads in (4, 2, 2))
    return {"q": q, "k": k, "v": v, "attn_mask": None, "key_padding_mask": None, "causal": True, **SOFTMAX}


def attention_decode(make: Make) -> Call:
    cache = {name: make.randn(MOST, 2, 300, 32) for name in ("k_cache", "v_cache")}
    lengths = make.randint(1, 301, MOST, dtype=torch.int32)
    none = {"block_table": None, "k_scale": None, "v_scale": None}
    return {"q": make.randn(MOST, 4, 1, 32), **cache, "seq_lens": lengths, **none, **SOFTMAX}


def attention_varlen(make: Make) -> Call:
    """A row of q in each sequence, so that its first dimension is the batch."""
    sums = make.tensor(range(MOST + 1), dtype=torch.int32)
    call = attention_decode(make)
    k, v = (call[name].transpose(1, 2) for name in ("k_cache", "v_cache"))
    lengths = {"cu_seqlens_q": sums, "cu_seqlens_k": None, "seqused_k": call["seq_lens"], "block_table": None}
    return {"q": make.randn(MOST, 4, 32), "k": k, "v": v, **lengths, "causal": True, **SOFTMAX, "return_lse": False}


BUILD: dict[str, tuple[str, Callable[[Make], Call]]] = {
    "rms_norm": ("rms_norm", lambda make: norm(make, offset=True)),
    "layer_norm": ("layer_norm", norm),
    "add_rms_norm": ("add_rms_norm", lambda make: norm(make, residual=True, offset=True)),
    "add_layer_norm": ("add_layer_norm", lambda make: norm(make, residual=True)),
    "rms_norm_quant": ("rms_norm_quant", lambda make: norm(make, offset=True)),
    "layer_norm_quant": ("layer_norm_quant", norm),
    "add_rms_norm_quant": ("add_rms_norm_quant", lambda make: norm(make, residual=True, offset=True)),
    "add_layer_norm_quant": ("add_layer_norm_quant", lambda make: norm(make, residual=True)),
    "swiglu": ("swiglu", gated),
    "swiglu_quant": ("swiglu_quant", gated),
    "gelu": ("gelu", lambda make: {"x": make.randn(MOST, HIDDEN), "approximate": "none"}),
    "gelu-tanh": ("gelu", lambda make: {"x": make.randn(MOST, HIDDEN), "approximate": "tanh"}),
    "quantize_int8": ("quantize_int8", lambda make: {"x": make.randn(MOST, HIDDEN)}),
    "rope": ("rope", rope),
    "linear": (
        "linear",
        lambda make: {
            "x": make.randn(MOST, HIDDEN),
            "weight": make.randn(OUT, HIDDEN),
            "bias": make.randn(OUT),
            "activation": "none",
        },
    ),
    "int8_linear-w8a8": ("int8_linear", lambda make: int8_linear(make, "w8a8")),
    "int8_linear-w8a16": ("int8_linear", lambda make: int8_linear(make, "w8a16")),
    "int8_matmul": ("int8_matmul", int8_matmul),
    "quantized_linear-q8_0": ("quantized_linear", lambda make: quantized_linear(make, "q8_0")),
    "quantized_linear-zero": ("quantized_linear", lambda make: quantized_linear(make, "u4-zero-g64")),
    "quantized_linear-q4_k": ("quantized_linear", lambda make: quantized_linear(make, "q4_k")),
    "quantized_linear-q6_k": ("quantized_linear", lambda make: quantized_linear(make, "q6_k")),
    "attention": ("attention", attention),
    "attention-one": ("attention", lambda make: attention(make, queries=1)),
    "attention_decode": ("attention_decode", attention_decode),
    "attention_varlen": ("attention_varlen", attention_varlen),
    "cross_entropy": ("cross_entropy", cross_entropy),
    "layers_": ("layers_", lambda make: decoder(make, 1, 33, batch=MOST, hidden=72, heads=(3, 1), dim=24, inner=96)),
}
NORM = ("x", "residual")
BATCHED = {
    **{op: NORM for op, _ in BUILD.values() if "norm" in op},
    **dict.fromkeys(("swiglu", "swiglu_quant"), ("gate", "up")),
    **dict.fromkeys(("gelu", "quantize_int8", "linear", "int8_linear"), ("x",)),
    "rope": ("q", "k"),
    "quantized_linear": ("x", "residual"),
    "int8_matmul": ("a_q", "a_scale", "residual"),
    "attention": ("q", "k", "v"),
    "attention_decode": ("q", "k_cache", "v_cache", "seq_lens"),
    "attention_varlen": ("q", "k", "v", "seqused_k"),
    "cross_entropy": ("logits", "labels"),
    "layers_": ("hidden", "inputs", "caches"),
}
"""The arguments that have a row, or batch element, at each index of their first dimension."""

PROMISING = [
    pytest.param(name, impl, id=f"{name}-{impl.backend.name}")
    for name, (op, _) in BUILD.items()
    for impl in dispatch.implementations(op)
    if impl.rows_alone != "no"
]


@pytest.fixture
def requested():
    """LLMKERN_BATCH_INVARIANT=1."""
    before = settings.batch_invariant
    _native.set_batch_invariant(True)
    yield
    _native.set_batch_invariant(before)


def rows_of(op: str, call: Call, rows: slice) -> Call:
    """The call for these rows alone, with memory of its own for what is written."""

    def of(value: Any) -> Any:
        if isinstance(value, list):
            return [of(each) for each in value]
        return value if value is None or len(value) == 1 else value[rows].clone()

    found = call | {name: of(call[name]) for name in BATCHED[op] if name in call}
    if op == "attention_varlen":
        found["cu_seqlens_q"] = call["cu_seqlens_q"][: found["q"].shape[0] + 1]
    return found


def differing(impl: dispatch.Implementation, call: Call) -> list[tuple[int, int]]:
    """(number of rows, row) wherever a row's bits are not those that it has alone."""
    alone = [as_list(impl.fn(**rows_of(impl.op, call, slice(i, i + 1)))) for i in range(MOST)]
    found = []
    for rows in ROWS:
        together = as_list(impl.fn(**rows_of(impl.op, call, slice(0, rows))))
        for i in range(rows):
            try:
                assert_same_bits([out[i : i + 1] for out in together], alone[i])
            except AssertionError:
                found.append((rows, i))
    return found


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "impl"), PROMISING)
def test_a_row_has_the_bits_that_it_has_alone(name, impl, dtype, requested) -> None:
    if impl.backend.missing:
        pytest.skip(impl.backend.missing)
    op, build = BUILD[name]
    for isa in here():
        with on(isa):
            call = build(Make(dtype, "cpu", 0))
            if reason := impl.why_not(**call):
                pytest.skip(reason)
            assert differing(impl, call) == []


@torch.no_grad()
@pytest.mark.parametrize(("name", "impl"), [p for p in PROMISING if p.values[1].rows_alone == "always"])
def test_what_always_keeps_rows_alone_is_not_asked_to(name, impl) -> None:
    if impl.backend.missing:
        pytest.skip(impl.backend.missing)
    op, build = BUILD[name]
    assert differing(impl, build(Make(torch.float32, "cpu", 0))) == []


@built
@torch.no_grad()
@pytest.mark.parametrize("name", ["linear", "int8_linear-w8a16"])
def test_the_request_is_what_keeps_floats_alone(name) -> None:
    """Were many rows multiplied as few are anyway, the request would promise what it does not change."""
    op, build = BUILD[name]
    assert differing(dispatch.implementation(op, "cpu"), build(Make(torch.float32, "cpu", 0)))


def test_every_op_is_here_and_who_promises_is_known() -> None:
    forward = [op for op in dispatch.ops() if not op.endswith("_backward")]
    # A loss over a batch multiplies the rows of a chunk together, and nobody asks for one row of it.
    unpromised = {"linear_cross_entropy", "linear_jsd", "linear_kl_div"}
    assert {op for op, _ in BUILD.values()} | unpromised == set(forward)
    assert all(impl.rows_alone == "no" for op in unpromised for impl in dispatch.implementations(op))
    for op, _ in BUILD.values():
        for impl in dispatch.implementations(op):
            on_request = op in ("linear", "int8_linear", "layers_")
            expected = ("on request" if on_request else "always") if impl.backend.name == "cpu" else "no"
            assert impl.rows_alone == expected, f"{op} on {impl.backend.name}"


@built
@torch.no_grad()
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_has_the_bits_that_it_has_in_a_step_of_its_own(cache_dtype) -> None:
    """So that speculative decoding, which asks for four, chooses the tokens that greedy decoding chooses."""
    make = Make(cache_dtype, "cpu", 0)
    decode = dispatch.implementation("attention_decode", "cpu").fn
    for isa in here():
        for length in (4, 7, 64, 66, 128, 130, 259):
            with on(isa):
                call = attention_decode(make)
                four = call | {"q": make.randn(MOST, 4, 4, 32), "seq_lens": torch.full((MOST,), length)}
                out, lse = decode(**four)
                for i in range(4):
                    one = four | {"q": four["q"][:, :, i : i + 1], "seq_lens": four["seq_lens"] - 3 + i}
                    assert_same_bits([out[:, :, i : i + 1], lse[:, :, i : i + 1]], decode(**one))


@torch.no_grad()
def test_others_refuse_where_it_is_requested(requested) -> None:
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    for backend in ("torch", "reference"):
        reason = dispatch.implementation("linear", backend).why_not(x=x, weight=weight, bias=None, activation="none")
        assert reason == "a row's bits may depend on the rows beside it, which LLMKERN_BATCH_INVARIANT=1 forbids"
    with pytest.raises(dispatch.Refused, match="a row's bits may depend on the rows beside it"):
        ops.linear(x, weight)


@built
@torch.no_grad()
def test_the_scheme_of_an_int8_layer_does_not_follow_the_rows(requested) -> None:
    call = int8_linear(Make(torch.float32, "cpu", 0), "w8a8")
    del call["scheme"], call["activation"]
    together = ops.int8_linear(**call)
    alone = [ops.int8_linear(**call | {"x": call["x"][i : i + 1]}) for i in range(MOST)]
    assert_same_bits([together], [torch.cat(alone)])


def test_the_environment_is_read_again(monkeypatch) -> None:
    monkeypatch.setenv("LLMKERN_BATCH_INVARIANT", "1")
    try:
        assert reload().batch_invariant
        assert dispatch.implementation("linear", "torch").why_not(
            x=torch.ones(1, 1), weight=torch.ones(1, 1), bias=None, activation="none"
        )
    finally:
        monkeypatch.undo()
        assert not reload().batch_invariant


@built
@torch.no_grad()
def test_explain_says_who_does_not_promise() -> None:
    class Module(torch.nn.Module):
        def forward(self, x):
            return ops.linear(ops.rms_norm(x), torch.ones(4, 8))

    told = explain(Module(), torch.randn(9, 8))
    assert [row.batch_invariant for row in told] == [True, False]
    assert "a row's bits may depend on the rows beside it: linear on torch" in str(told).splitlines()
