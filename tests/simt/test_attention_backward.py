"""The CUDA kernels of attention's backward, executed by the SIMT machine, against the reference in float64.

The bits are to be the same under every order of blocks and warps and every arrival of copies.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from machine import COPIES

from llmkern import dispatch
from llmkern.testing.case import Call, Case, Make, cases
from llmkern.testing.cases.attention import random_call
from llmkern.testing.compare import assert_same_bits
from llmkern.testing.judge import assert_accurate, reference

OP = "attention_backward"
NAMES = ["dq", "dk", "dv", "dmask", "dsinks"]
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
CUDA = dispatch.implementation(OP, "cuda")
CASES = [case for case in cases("attention") if CUDA.dtypes is not None and case.dtype in CUDA.dtypes]
SHAPES = [(1, 1), (1, 130), (113, 203), (67, 3)]
DIMS = [40, 64, 96, 128, 256]
forward = partial(random_call, batch=2, heads=(4, 2))


def backward_of(call: Call, make: Make, *, keep_lse: bool = True) -> Call:
    """The backward's call, behind the reference's forward; through the log-sum-exp too if the call returned it."""
    call = dict(call)
    through_lse = call.pop("return_lse")
    out, lse = reference("attention", call | {"return_lse": True})
    return call | {
        "dout": make.randn(*out.shape),
        "dlse": make.randn(*lse.shape, dtype=lse.dtype) if through_lse else lse.new_empty(0),
        "out": out,
        "lse": lse if keep_lse else lse.new_empty(0),
        "mask_grad": call["attn_mask"] is not None and call["attn_mask"].is_floating_point(),
    }


def judge(operators, call: Call) -> None:
    """Approximate instructions err as they may, but where a mask's gradient is in fp32: the baseline is the CPU's."""
    mask, results = call["attn_mask"], []
    approximate = 0 if mask is not None and mask.dtype == torch.float32 else 1
    for seed in (0, 1):
        operators.set(seed=seed, copies=COPIES[seed], approximate=approximate)
        results.append(operators.op(OP, call))
    assert_same_bits(results[1], results[0])
    assert_accurate(OP, call, results[0], NAMES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases_of_the_forward(operators, case: Case) -> None:
    call = backward_of(case.make(), Make(case.dtype, "cpu", seed=1))
    assert CUDA.refuse is not None
    assert CUDA.refuse(**call) is None
    judge(operators, call)


@HALVES
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_sizes(operators, shape: tuple[int, int], dim: int, dtype: torch.dtype) -> None:
    """Every kernel, without and with its own row sums, on several blocks and on less than one."""
    make = Make(dtype, "cpu", seed=0)
    # A query that sees one key has gradients of 0, of which rounding errors are no fraction; a sink makes them others.
    sinks = make.randn(2) if shape[1] == 1 else None
    call = random_call(make, *shape, dim=dim, sinks=sinks)
    for keep_lse in (True, False):
        judge(operators, backward_of(call, make, keep_lse=keep_lse))


def padding(make: Make, keys: int) -> torch.Tensor:
    return make.tensor(range(keys), torch.int64) < make.tensor([keys, keys // 3], torch.int64)[:, None]


def low_mask(make: Make, queries: int, keys: int) -> torch.Tensor:
    """Numbers as models hide keys by; a row of nothing else has a log-sum-exp without any digit of its sum's."""
    mask = make.randn(2, 1, queries, keys).masked_fill(make.randn(2, 1, queries, keys) > 0.5, -3e38)
    mask[0, 0, 3] = -3e38
    return mask


FEATURES = {
    "causal": lambda make, heads, queries, keys: {"causal": True},
    "window": lambda make, heads, queries, keys: {"window": [40, 9]},
    "window-causal": lambda make, heads, queries, keys: {"window": [17, 17], "causal": True},
    "softcap": lambda make, heads, queries, keys: {"softcap": 2.0, "causal": True},
    "scale": lambda make, heads, queries, keys: {"sm_scale": -0.3},
    "sinks": lambda make, heads, queries, keys: {
        "sinks": make.randn(heads, scale=2.0),
        "window": [30, 0],
        "return_lse": True,
    },
    "bool-mask": lambda make, heads, queries, keys: {"attn_mask": make.randn(1, 1, queries, keys) > 0},
    "padding": lambda make, heads, queries, keys: {"key_padding_mask": padding(make, keys)},
    "bias": lambda make, heads, queries, keys: {"attn_mask": make.randn(1, heads, queries, keys), "softcap": 3.0},
    "bias-fp32": lambda make, heads, queries, keys: {"attn_mask": make.randn(2, 1, 1, keys, dtype=torch.float32)},
    "low-mask": lambda make, heads, queries, keys: {"attn_mask": low_mask(make, queries, keys).to(torch.bfloat16)},
    "everything": lambda make, heads, queries, keys: {
        "attn_mask": make.randn(2, heads, queries, keys),
        "key_padding_mask": padding(make, keys),
        "sinks": make.randn(heads),
        "causal": True,
        "window": [60, 60],
        "softcap": 5.0,
        "return_lse": True,
    },
}


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(operators, feature: str, dim: int) -> None:
    make = Make(torch.bfloat16, "cpu", seed=0)
    heads, queries, keys = {64: (4, 65, 161), 128: (2, 50, 140), 256: (2, 33, 75)}[dim]
    options = FEATURES[feature](make, heads, queries, keys)
    judge(operators, backward_of(forward(make, queries, keys, heads=(heads, heads // 2), dim=dim, **options), make))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("shape", [(1, 2, 70, 75), (2, 1, 70, 1), (1, 1, 1, 75), (2, 2, 1, 1)], ids=str)
def test_the_gradient_of_a_mask(operators, shape: tuple[int, ...], dim: int) -> None:
    """Summed over what the mask was broadcast over; several tiles of it, and of what it was broadcast over."""
    make = Make(torch.float16, "cpu", seed=0)
    mask = make.randn(*shape, dtype=torch.float32)
    call = forward(make, 70, 75, heads=(2, 1), dim=dim, attn_mask=mask, window=[50, 20], softcap=4.0)
    judge(operators, backward_of(call, make))


def test_the_gradient_of_an_expanded_mask(operators) -> None:
    """Each of its elements has one, whatever memory they share."""
    make = Make(torch.bfloat16, "cpu", seed=0)
    mask = make.randn(1, 1, 9, 20).expand(2, 4, 9, 20)
    judge(operators, backward_of(forward(make, 9, 20, dim=64, attn_mask=mask), make))


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 24), (24, 128), (192, 128)])
def test_values_of_another_size(operators, dim: int, value_dim: int) -> None:
    make = Make(torch.float16, "cpu", seed=0)
    values = make.randn(2, 2, 50, value_dim)
    judge(operators, backward_of(forward(make, 33, 50, dim=dim, v=values, causal=True), make))


def test_vectors_that_lie_anywhere(operators) -> None:
    """Slices, rows that are not aligned, and the gradient of a sum, all of whose strides are 0."""
    make = Make(torch.bfloat16, "cpu", seed=0)
    call = forward(make, 20, 30, dim=40, causal=True)
    call["q"] = make.randn(2, 20, 4, 44)[..., 1:41].transpose(1, 2)
    call["k"], call["v"] = make.randn(2, 2, 30, 80).split(40, -1)
    call = backward_of(call, make)
    call["dout"] = make.randn(1).expand(call["out"].shape)
    judge(operators, call)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=["0x5", "5x0"])
def test_nothing_to_attend_to(operators, shape: tuple[int, int]) -> None:
    """Gradients of what was not used are 0; the sink's is not, where there are queries."""
    make = Make(torch.float16, "cpu", seed=0)
    judge(operators, backward_of(forward(make, *shape, dim=64, sinks=make.randn(4), return_lse=True), make))


def test_rows_that_see_nothing_give_nothing(operators) -> None:
    make = Make(torch.bfloat16, "cpu", seed=0)
    call = backward_of(forward(make, 40, 25, dim=64, causal=True), make)
    assert bool((call["lse"][:, :, :15] == -math.inf).all())
    operators.set()
    dq = operators.op(OP, call)[0]
    assert bool((dq[:, :, :15] == 0).all())
    assert bool((dq[:, :, 15:] != 0).any())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"q": torch.zeros(1, 1, 3, 59), "v": torch.zeros(1, 1, 3, 64)},
            "q has head dimension 59; only multiples of 8",
        ),
        ({"v": torch.zeros(1, 1, 3, 264)}, "v has head dimension 264; at most 256 is taken"),
        ({"sinks": torch.zeros(1, dtype=torch.float64)}, "sinks is torch.float64"),
        ({"sinks": torch.zeros(4, 2)[:, 0]}, "sinks is not contiguous"),
    ],
)
def test_refusals(change: Call, sentence: str) -> None:
    make = Make(torch.bfloat16, "cpu", seed=0)
    assert CUDA.refuse is not None
    assert sentence in str(CUDA.refuse(**(backward_of(forward(make, 3, 3, dim=64), make) | change)))
