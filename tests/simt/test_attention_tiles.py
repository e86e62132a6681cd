"""Attention on the SIMT machine beyond the shared cases: sizes for each tile, features across blocks of keys."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from llmkern import dispatch
from llmkern.testing.case import Call, Make
from llmkern.testing.cases.attention import random_call
from llmkern.testing.compare import assert_as_accurate, assert_same_bits, upcast
from llmkern.testing.judge import baseline, reference, spreads_of

CUDA = next(i for i in dispatch.implementations("attention") if i.backend.name == "cuda")
DTYPES = [torch.bfloat16, torch.float16]
DIMS = [40, 64, 96, 128, 256]
SIZES = [(1, 1), (1, 1023), (239, 1), (113, 203), (799, 3)]
# With one SM large tiles are chosen, with many the small ones; copies land at once, late, or between.
MACHINES = [(0, "at once", 1), (1, "late", 1), (2, "late", 1000), (3, "random", 1000)]
call_of = partial(random_call, return_lse=True)


def judge(operators, call: Call, machines=MACHINES, capability: tuple[int, int] = (9, 0)) -> None:
    """As accurate as PyTorch, and for each choice of tiles with the same bits whatever the order."""
    assert CUDA.refuse is not None
    assert CUDA.refuse(**call) is None
    base, exact = baseline("attention", call), reference("attention", upcast(call))
    if call["return_lse"] and base[1].numel() == 0:
        base = reference("attention", call)
    allowed = spreads_of("attention", call, exact)
    results: dict[int, list[Tensor]] = {}
    for seed, copies, sm_count in machines:
        operators.set(seed=seed, copies=copies, sm_count=sm_count, capability=capability)
        out = operators.op("attention", call)
        assert_as_accurate(out, baseline=base, exact=exact, spreads=allowed, names=["out", "lse"])
        assert_same_bits(out, results.setdefault(sm_count, out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_odd_sizes(operators, queries: int, keys: int, dim: int, dtype: torch.dtype) -> None:
    for seed, causal in enumerate((False, True)):
        judge(operators, call_of(Make(dtype, "cpu", seed), queries, keys, dim=dim, causal=causal), MACHINES[seed::2])


def real_keys(make: Make, *lengths: int, keys: int) -> Tensor:
    return make.tensor(range(keys), torch.int64) < make.tensor(lengths, torch.int64)[:, None]


FEATURES = {
    "window-left": lambda make: {"causal": True, "window": [70, -1]},
    "window-both-sides": lambda make: {"window": [30, 20]},
    "window-of-one": lambda make: {"window": [0, 0]},
    "softcap": lambda make: {"causal": True, "softcap": 5.0},
    "sinks": lambda make: {"causal": True, "window": [40, -1], "sinks": make.randn(4, scale=3.0)},
    "sinks-fp32": lambda make: {"sinks": make.randn(4, dtype=torch.float32)},
    "padding": lambda make: {"key_padding_mask": real_keys(make, 171, 65, keys=171)},
    "no-keys-and-sinks": lambda make: {
        "key_padding_mask": real_keys(make, 0, 171, keys=171), "sinks": make.randn(4), "causal": True
    },
    "padding-every-third": lambda make: {"key_padding_mask": (torch.arange(342) % 3 > 0).view(2, 171)},
    "mask-per-key": lambda make: {"attn_mask": make.randint(0, 2, 2, 1, 1, 171, dtype=torch.bool)},
    "mask-per-query": lambda make: {"attn_mask": make.randint(0, 2, 1, 4, 150, 1, dtype=torch.bool), "causal": True},
    "mask-transposed": lambda make: {"attn_mask": make.randint(0, 2, 1, 1, 171, 150, dtype=torch.bool).mT},
    "bias": lambda make: {"attn_mask": make.randn(1, 4, 150, 171, scale=3.0), "causal": True},
    "bias-fp32": lambda make: {"attn_mask": make.randn(2, 1, 150, 171, dtype=torch.float32), "softcap": 4.0},
    "scale-negative": lambda make: {"sm_scale": -0.3},
    "scale-zero": lambda make: {"sm_scale": 0.0, "causal": True},
    "without-lse": lambda make: {"causal": True, "return_lse": False},
}  # fmt: skip


@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float16), (128, torch.bfloat16), (256, torch.float16)])
@pytest.mark.parametrize("feature", FEATURES)
def test_features_across_blocks(operators, feature: str, dim: int, dtype: torch.dtype) -> None:
    make = Make(dtype, "cpu", seed=0)
    judge(operators, call_of(make, 150, 171, dim=dim, batch=2, heads=(4, 2), **FEATURES[feature](make)), MACHINES[1:3])


@pytest.mark.parametrize("feature", ["window-both-sides", "padding", "bias", "sinks"])
@pytest.mark.parametrize("dim", [72, 128])
def test_compact_tiles(operators, dim: int, feature: str) -> None:
    """What GPUs with 100 KiB of shared memory on an SM get: 32 keys at a time instead of 64."""
    make = Make(torch.bfloat16, "cpu", seed=0)
    call = call_of(make, 150, 171, dim=dim, batch=2, heads=(4, 2), **FEATURES[feature](make))
    judge(operators, call, MACHINES[1:3], capability=(8, 9))


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 16), (64, 128), (72, 256), (192, 128), (200, 192)])
def test_values_of_another_dimension(operators, dim: int, value_dim: int) -> None:
    make = Make(torch.bfloat16, "cpu", seed=0)
    call = call_of(make, 70, 90, dim=dim, heads=(3, 3), causal=True)
    judge(operators, call | {"v": make.randn(1, 3, 90, value_dim)})


def test_vectors_that_lie_anywhere(operators) -> None:
    """Heads and positions in any order, vectors 16-byte aligned: the bits of contiguous copies."""
    fused = Make(torch.float16, "cpu", seed=0).randn(2, 140, 9, 3 * 40 + 8)[..., 8:].transpose(1, 2)
    q, k, v = fused.split(40, -1)
    call = call_of(Make(torch.float16, "cpu", seed=1), 140, 140, dim=40, causal=True) | {"q": q, "k": k, "v": v}
    plain = {name: value.contiguous() if isinstance(value, Tensor) else value for name, value in call.items()}
    for seed, copies, sm_count in MACHINES:
        operators.set(seed=seed, copies=copies, sm_count=sm_count)
        out, lse = operators.op("attention", call)
        assert out.transpose(1, 2).is_contiguous()
        assert_same_bits((out, lse), operators.op("attention", plain))


def test_strides_beyond_32_bits(operators) -> None:
    """Two sequences 2³² bytes apart in a storage of which nothing else is touched."""
    storage = torch.empty(2**31 + 3 * 16, dtype=torch.bfloat16)
    far = storage.as_strided((2, 1, 3, 16), (2**31, 48, 16, 1))
    far.copy_(torch.randn(2, 1, 3, 16))
    operators.set()
    call = call_of(Make(torch.bfloat16, "cpu", seed=0), 3, 3, dim=16, batch=2)
    spread = operators.op("attention", call | {"q": far, "k": far, "v": far})
    near = far.contiguous()
    assert_same_bits(spread, operators.op("attention", call | {"q": near, "k": near, "v": near}))


def test_heads_in_sections(operators) -> None:
    """With keys and values beyond L2, a section of heads after the other: the bits of the few keys that are seen."""
    make = Make(torch.bfloat16, "cpu", seed=0)
    call = call_of(make, 130, 256, dim=16, batch=3, heads=(4, 2), causal=True, window=[40, -1])
    keys = 64 * 5000
    for name in ("k", "v"):
        long = torch.zeros(1, 1, keys, 16, dtype=torch.bfloat16)
        long[:, :, -256:] = call[name][:1, :1]
        call[name] = long.expand(3, 2, keys, 16)
    near = call | {name: call[name][:, :, -256:] for name in ("k", "v")}
    for seed, copies, sm_count in MACHINES:
        operators.set(seed=seed, copies=copies, sm_count=sm_count)
        assert_same_bits(operators.op("attention", call), operators.op("attention", near))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_what_no_query_sees(operators, dim: int) -> None:
    """Unseeing rows are 0 and −inf; NaN in keys beyond a window or causality reaches nobody in blocks not visited."""
    make = Make(torch.bfloat16, "cpu", seed=0)
    call = call_of(make, 300, 170, dim=dim, causal=True)
    call["k"][:, :, 160:] = call["v"][:, :, 160:] = math.nan
    for seed, copies, sm_count in MACHINES:
        operators.set(seed=seed, copies=copies, sm_count=sm_count)
        out, lse = operators.op("attention", call)
        assert out[:, :, :130].count_nonzero() == 0
        assert bool((lse[:, :, :130] == -math.inf).all())
        assert bool(out[:, :, 130 : 130 + 64].isfinite().all())
        assert bool(out[:, :, 290:].isnan().all())
        assert bool(lse[:, :, 290:].isnan().all())


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_nan_and_infinity_reach_whoever_sees_them(operators, dim: int, name: str) -> None:
    for value in (math.nan, math.inf):
        call = call_of(Make(torch.float16, "cpu", seed=0), 70, 130, dim=dim, causal=name != "q")
        call[name][0, 0, 66, 3] = value
        expected = reference("attention", upcast(call))[0].isfinite()
        assert not bool(expected.all())
        for seed, copies, sm_count in MACHINES:
            operators.set(seed=seed, copies=copies, sm_count=sm_count)
            assert torch.equal(operators.op("attention", call)[0].isfinite(), expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q": torch.zeros(1, 2, 5, 59), "k": torch.zeros(1, 1, 7, 59)}, "q has head dimension 59; only multiples"),
        ({"v": torch.zeros(1, 1, 7, 264)}, "v has head dimension 264; at most 256 is taken"),
        ({"k": torch.zeros(1, 1, 64, 7).mT}, "k's last dimension has stride 7; only 1 is taken"),
        ({"v": torch.zeros(1, 1, 7, 68, dtype=torch.half)[..., :64]}, "v has vectors 136 bytes apart; only multiples"),
        ({"sinks": torch.zeros(2).double()}, "sinks is torch.float64"),
        ({"k": torch.zeros(1, 1, 1, 64).expand(1, 1, 2**29 + 1, 64)}, "536870913 keys, 10 queries of all heads"),
    ],
)  # fmt: skip
def test_refusals(change: dict[str, Tensor], reason: str) -> None:
    call = call_of(Make(torch.bfloat16, "cpu", seed=0), 5, 7, dim=64)
    assert CUDA.refuse is not None
    assert CUDA.refuse(**call) is None
    refused = CUDA.refuse(**(call | change))
    assert refused is not None
    assert refused.startswith(reason)


def test_the_operator_answers_what_the_kernel_does_not_take(operators) -> None:
    """By the reference: other head dimensions, float32."""
    operators.set()
    for call in (
        call_of(Make(torch.bfloat16, "cpu", seed=0), 5, 7, dim=59),
        call_of(Make(torch.float32, "cpu", seed=0), 5, 7, dim=64),
    ):
        assert_same_bits(operators.op("attention", call), reference("attention", call))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_storage_that_begins_anywhere_is_copied(operators, name: str) -> None:
    """The kernel's bits, not the reference's, and nothing is read but whole vectors."""
    call = call_of(Make(torch.bfloat16, "cpu", seed=0), 70, 90, dim=64)
    late = torch.zeros(call[name].numel() + 3, dtype=torch.bfloat16)[3:].view_as(call[name]).copy_(call[name])
    assert late.data_ptr() % 16 == 6
    operators.set(count=True)
    assert_same_bits(operators.op("attention", call | {name: late}), operators.op("attention", call))
    assert any(c["instruction"] == "mma.m16n8k16.bf16" for c in operators.counters())
