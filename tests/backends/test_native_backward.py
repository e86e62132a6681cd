"""Gradients on the CPU: each instruction set judged, incoming gradients that lie anywhere, any number of threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from instruction_sets import here, on
from torch import Tensor

from llmkern import _native, dispatch
from llmkern.testing.case import Call, Case, Make, cases
from llmkern.testing.compare import as_list, assert_same_bits
from llmkern.testing.judge import assert_accurate, reference
from llmkern.testing.recorder import Recorder

pytestmark = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))

ROWS, HEADS = ("rms_norm", "layer_norm", "swiglu", "gelu"), ("attention",)
CASES = [case for op in ROWS + HEADS for case in cases(op) if case.differentiable and case.dtype != torch.float16]


def gradient_of(case: Case) -> tuple[str, Call]:
    """The op that the gradient of `case` asks for, and its call."""
    call = {
        name: value.detach().clone().requires_grad_() if name in case.differentiable and value is not None else value
        for name, value in case.make().items()
    }
    outputs = [o for o in as_list(getattr(torch.ops.llmkern, case.op)(**call)) if o.requires_grad]
    make = Make(torch.float32, "cpu", seed=1)
    weights = [make.randn(*o.shape, dtype=o.dtype) for o in outputs]
    wanted = [value for value in call.values() if isinstance(value, Tensor) and value.requires_grad]
    recorded = Recorder()
    with dispatch.recording(recorded):
        torch.autograd.grad(outputs, wanted, weights)
    op, asked = recorded.calls[-1]
    return op, {name: value.detach() if isinstance(value, Tensor) else value for name, value in asked.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case}")
def test_each_instruction_set_keeps_the_accuracy_rule(case: Case) -> None:
    op, call = gradient_of(case)
    judged: list[list[Any]] = []
    for isa in here():
        with on(isa):
            out = as_list(getattr(torch.ops.llmkern, op)(**call))
            bits = [(o.shape, o.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for o in out]
            if bits not in judged:
                assert_accurate(op, call, out, [f"{op}, output {i}" for i in range(len(out))])
                judged.append(bits)


def apart(gradient: Tensor) -> Tensor:
    """The same numbers, none of them beside the next."""
    wide = gradient.new_zeros(*gradient.shape, 3)
    wide[..., 1] = gradient
    return wide[..., 1]


def one_for_all(gradient: Tensor) -> Tensor:
    """As sum() gives it: one number, expanded."""
    return gradient.new_full((), 0.75).expand(gradient.shape)


@pytest.mark.parametrize("change", [apart, one_for_all])
@pytest.mark.parametrize("op", ROWS + HEADS)
def test_incoming_gradients_that_lie_anywhere(op: str, change: Callable[[Tensor], Tensor]) -> None:
    """By the operator itself, which copies what it cannot read."""
    case = [case for case in cases(op) if case.differentiable and case.dtype == torch.float32][3]
    name, call = gradient_of(case)
    incoming = next(iter(call))
    call[incoming] = change(call[incoming])
    assert not call[incoming].is_contiguous() or call[incoming].numel() <= 1
    out = as_list(getattr(torch.ops.llmkern, name)(**call))
    assert_accurate(name, call, out, [f"output {i}" for i in range(len(out))])
    assert_same_bits(out, as_list(getattr(torch.ops.llmkern, name)(**{**call, incoming: call[incoming].contiguous()})))


def _attention(**options: Any) -> Call:
    """Long enough for several splits and blocks of keys; odd."""
    make = Make(torch.float32, "cpu", seed=0)
    q, dout = make.randn(2, 6, 301, 59), make.randn(2, 6, 301, 40)
    k, v = make.randn(2, 2, 333, 59), make.randn(2, 2, 333, 40)
    forward = {
        "q": q,
        "k": k,
        "v": v,
        "attn_mask": None,
        "key_padding_mask": None,
        "sinks": None,
        "causal": True,
        "sm_scale": 0.2,
        "window": [-1, -1],
        "softcap": 0.0,
    } | options
    out, lse = reference("attention", forward | {"return_lse": True})
    return {"dout": dout, "dlse": lse.new_empty(0), **forward, "out": out, "lse": lse, "mask_grad": False}


def _rows(*names: str, **more: Any) -> Call:
    make = Make(torch.float32, "cpu", seed=0)
    return {**{name: make.randn(301, 577) for name in names}, **more}


SHARED: dict[str, Callable[[], Call]] = {
    "rms_norm_backward": lambda: _rows("dy", "x", weight=torch.randn(577), bias=None, eps=1e-6, weight_offset=0.0),
    "layer_norm_backward": lambda: _rows("dy", "x", weight=torch.randn(577), bias=torch.randn(577), eps=1e-6),
    "swiglu_backward": lambda: _rows("dy", "gate", "up"),
    "gelu_backward": lambda: _rows("dy", "x", approximate="none"),
    "attention_backward": _attention,
    "attention_backward-sinks": lambda: _attention(sinks=torch.randn(6), softcap=5.0, window=[100, 0]),
    "attention_backward-mask": lambda: (
        _attention(attn_mask=torch.randn(1, 6, 301, 333), causal=False) | {"mask_grad": True}
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    """And calls of several splits are right."""
    op, call, before = name.split("-")[0], SHARED[name](), torch.get_num_threads()
    for isa in here():
        with on(isa):
            try:
                results = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(as_list(getattr(torch.ops.llmkern, op)(**call)))
            finally:
                torch.set_num_threads(before)
            assert_same_bits(results[0], results[1])
            assert_same_bits(results[0], results[2])
    assert_accurate(op, call, results[0], [f"output {i}" for i in range(len(results[0]))])


@pytest.mark.parametrize("hidden", [1, 3, 17, 65, 577, 9000])
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_rows_longer_than_the_stack_keeps(op: str, hidden: int) -> None:
    make = Make(torch.bfloat16, "cpu", seed=0)
    call = {"dy": make.randn(40, hidden), "x": make.randn(40, hidden), "weight": make.randn(hidden)}
    call |= {"bias": make.randn(hidden), "eps": 1e-6} | ({"weight_offset": 0.0} if op == "rms_norm" else {})
    for isa in here():
        with on(isa):
            out = as_list(getattr(torch.ops.llmkern, f"{op}_backward")(**call))
            assert_accurate(f"{op}_backward", call, out, ["dx", "dweight", "dbias"])
