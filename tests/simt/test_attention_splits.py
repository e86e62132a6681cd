"""attention_decode's CUDA kernels on the SIMT machine, beyond the shared cases: every one that the launcher can choose,
sequences of all lengths in one batch, and keys parted into splits."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from faults import FAULTS
from judging import CUDA, judge
from planted import equal_keys

from llmkern.testing.case import Call, Case, Make, cases
from llmkern.testing.compare import assert_same_bits

BOTH = (torch.bfloat16, torch.float16)
LENGTHS = (1, 3, 63, 64, 65, 300)
OPTIONS = {
    "window": {"window": [70, 0]},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "lse": {"return_lse": True},
    "all": {"window": [129, 0], "softcap": 2.0, "sinks": True, "return_lse": True},
}


def changed(name: str, dtype: torch.dtype, **keywords: object) -> Case:
    """One of the shared cases with other arguments."""
    own = next(case for case in cases("attention_decode") if case.name == name and case.dtype == dtype)
    assert isinstance(own.build, functools.partial)
    build = functools.partial(own.build.func, *own.build.args, **(own.build.keywords | keywords))
    return dataclasses.replace(own, build=build, name=f"{name}-changed")


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("stored", ["paged-4", "int8-paged"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("heads", "queries"), [((3, 1), 4), ((8, 2), 5)], ids=["12-rows", "20-rows"])
def test_every_kernel(operators, heads: tuple[int, int], queries: int, dim: int, stored: str, dtype) -> None:
    judge(operators, changed(stored, dtype, lengths=(5, 140), block_size=16, heads=heads, queries=queries, dim=dim))


@pytest.mark.parametrize(("dim", "dtype"), [(40, BOTH[0]), (64, BOTH[1]), (96, BOTH[0]), (128, BOTH[1])], ids=str)
@pytest.mark.parametrize(("group", "queries"), [(1, 1), (3, 1), (4, 4), (8, 1), (32, 1), (4, 16)])
def test_groups_and_queries(operators, group: int, queries: int, dim: int, dtype) -> None:
    """Sequences of all lengths, shorter than the queries too."""
    paged = (group + queries) % 2 == 0
    name, keywords = ("paged-4", {"block_size": 16}) if paged else ("24-slots", {"slots": 300, "poison": torch.nan})
    judge(operators, changed(name, dtype, lengths=LENGTHS, heads=(group, 1), queries=queries, dim=dim, **keywords))


@pytest.mark.parametrize("stored", ["nan-past-the-end", "int8"])
@pytest.mark.parametrize(("group", "queries"), [(4, 1), (8, 4)])
@pytest.mark.parametrize("option", OPTIONS)
def test_splits(operators, option: str, group: int, queries: int, stored: str) -> None:
    """As many as there may be: with few of 132 SMs busy; some sequences are too short for them, one is empty."""
    lengths = (300, 0, 520, 129)
    keywords = {"lengths": lengths, "slots": 520, "heads": (group, 1), "queries": queries, "dim": 64}
    case = changed(stored, torch.bfloat16, **keywords, **OPTIONS[option])
    judge(operators, case, sm_count=132)


@pytest.mark.parametrize(("name", "queries"), [("paged-4", 1), ("nan-past-the-end", 9), ("int8-paged", 9), ("int8", 1)])
def test_every_order_gives_the_same(operators, name: str, queries: int) -> None:
    """Vary the order of warps, blocks and copies; a copy that lands late shows who did not wait for it."""
    size = {"block_size": 16} if "paged" in name else {"slots": 600}
    case = changed(name, torch.float16, lengths=(600, 77), heads=(4, 2), queries=queries, dim=64, **size)
    judge(operators, case, seeds=range(8), sm_count=16)


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("size", [1e-4, 200.0])
def test_codes_of_small_and_of_large_values(operators, size: float, dtype: torch.dtype) -> None:
    """A weight times its scale keeps its precision, and stays finite."""
    own = changed("int8", dtype, lengths=(200, 3), slots=200, dim=64)

    def build(make: Make) -> Call:
        call = own.build(make)
        return call | {"v_scale": call["v_scale"] * size}

    judge(operators, dataclasses.replace(own, build=build))


@pytest.mark.parametrize("name", ["paged-4", "24-slots"])
def test_wild_lengths_read_nothing_outside_the_cache(operators, name: str) -> None:
    call = changed(name, torch.float16, lengths=(21, 8, 16)).make()
    call["seq_lens"] = torch.tensor([-(10**9), 10**9, 7], dtype=torch.int32)
    operators.set()
    operators.op("attention_decode", call)


def test_wild_entries_of_a_block_table_are_clamped(operators) -> None:
    call = changed("paged-4", torch.float16, lengths=(21, 8)).make()
    for name in ("k_cache", "v_cache"):
        call[name] = call[name].nan_to_num(0.5)
    call["block_table"][0, 0], call["block_table"][1, 0] = -7, 1_000_000
    operators.set()
    wild = operators.op("attention_decode", call)
    call["block_table"] = call["block_table"].clamp(0, len(call["k_cache"]) - 1)
    assert_same_bits(wild, operators.op("attention_decode", call))


def test_vectors_that_are_not_aligned_are_copied(operators) -> None:
    call = changed("24-slots", torch.bfloat16, dim=24).make()
    for name in ("q", "k_cache", "v_cache"):
        call[name] = call[name][..., 3:19]  # of 24: every vector begins at 6 bytes beyond a multiple of 16
    aligned = call | {name: call[name].clone() for name in ("q", "k_cache", "v_cache")}
    operators.set()
    assert_same_bits(operators.op("attention_decode", call), operators.op("attention_decode", aligned))


@pytest.mark.parametrize("logit", [20.0, 50.0])
def test_equal_keys_count_alike_however_many(operators, logit: float) -> None:
    """The log-sum-exp of n equal logits is theirs + log n: no step rescales what came before where no maximum moved."""
    call = equal_keys(logit, 16384)
    exact = call["k_cache"][0, 0, 0, 0].item() * call["sm_scale"] + math.log(16384)
    contracted = next(number for number, fault in enumerate(FAULTS, 1) if fault.kind == "contraction")
    errors = []
    for fault in (0, contracted):
        operators.set(sm_count=1, fault=fault)
        _, lse = operators.op("attention_decode", call)
        errors.append(abs(lse.item() - exact) / (torch.finfo(torch.float32).eps * exact))
    assert errors[0] <= 2
    assert errors[1] > 4, "what the exponent's form is for does not show"


@pytest.mark.parametrize(
    ("dim", "sentence"),
    [
        (59, "q has head dimension 59; only multiples of 8 are taken"),
        (264, "q has head dimension 264; at most 256 is taken"),
    ],
)
def test_head_dimensions_that_are_refused(dim: int, sentence: str) -> None:
    assert CUDA["attention_decode"].refuse(**changed("24-slots", torch.float16, dim=dim).make()) == sentence


def test_strides_and_lengths_that_are_refused() -> None:
    call = changed("24-slots", torch.float16).make()
    odd = call | {"v_cache": torch.zeros(2, 2, 24, 20).half()[..., :16]}
    long = call | {"k_cache": call["k_cache"][:, :, :1].expand(-1, -1, 2**30, -1)}
    refuse = CUDA["attention_decode"].refuse
    assert refuse(**odd) == "v_cache has vectors 40 bytes apart; only multiples of 16 are taken"
    assert refuse(**long) == "the cache has room for 1073741824 tokens of a sequence; at most 536870912 are taken"
