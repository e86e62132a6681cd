"""The machine's own rules, each against its breaking: orders, memory, races, where lanes meet, limits, counters."""

from __future__ import annotations

import re

import pytest
import torch
from machine import COPIES

SEEDS = (0, 1, 7)
POISON = -1  # of int32: all bits set


def test_seeds_change_the_order_of_warps_and_blocks(instructions) -> None:
    orders = []
    for seed in (0, 0, *range(1, 6)):
        counter, out = torch.zeros(1, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
        instructions.set(seed=seed)
        assert instructions.run("run_order", counter, out, outputs=2) == ""
        assert sorted(out.tolist()) == list(range(32))
        orders.append(out.tolist())
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) > 4


MISTAKES = {
    1: "ld.global of 4 bytes at byte 128 of argument 1, which has 128 bytes",
    2: "ld.global of 16 bytes at byte 4 of argument 1, which is not aligned",
    3: "st.global of 4 bytes at byte 0 of argument 1, which may only be read",
    4: "st.shared of 4 bytes at byte 256 of shared memory, which has 256 bytes",
    5: "no thread can go on: threads 32-63: exited; threads 0-31: waits at bar.sync 0",
    6: "while lanes that it needs are at",
    7: "ld.global.nc.v4 of 16 bytes at byte 4 of argument 1, which is not aligned",
    8: "st.global.v4 of 16 bytes at byte 128 of argument 2, which has 128 bytes",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(instructions, mistake: int, seed: int) -> None:
    instructions.set(seed=seed)
    error = instructions.run("run_broken", mistake, torch.zeros(32, dtype=torch.int32), torch.zeros(32))
    assert error.startswith("broken: block (")
    assert MISTAKES[mistake] in error


def test_shared_memory_is_poisoned_before_each_block(instructions) -> None:
    out = torch.zeros(2, dtype=torch.int32)
    instructions.set()
    assert instructions.run("run_broken", 0, torch.zeros(32, dtype=torch.int32), out) == ""
    assert out.tolist() == [POISON, POISON]


NEEDS = {"warps": "the two warps need a barrier", "lanes": "need a __syncwarp() or a barrier"}
NEEDS |= {
    "copy": "cp.async",
    "flying": "is still on its way",
}  # that, or landed for one thread only: as the seed has it
NEEDS |= {"blocks": "nothing orders blocks of a launch but an atomic operation between two __threadfence()"}
# What instructions.cu does in this order, and what is missing in it.
ORDERS = {
    "warps": NEEDS["warps"],
    "warps_barrier": "",
    "lanes": NEEDS["lanes"],
    "lanes_syncwarp": "",
    "lanes_shuffle": NEEDS["lanes"],
    "lanes_half_syncwarp": NEEDS["lanes"],
    "overwritten": NEEDS["warps"],
    "overwritten_barrier": "",
    "landed_for_one": NEEDS["copy"],
    "landed_barrier": "",
    "two_copies": NEEDS["flying"],
    "ldmatrix_before_store": NEEDS["lanes"],
    "ldmatrix_syncwarp": "",
    "arrive_orders": "",
    "arrive_orders_nothing_back": NEEDS["warps"],
    "bytes_beside_each_other": "",
    "blocks": NEEDS["blocks"],
    "blocks_apart": "",
    "blocks_atomic": "",
    "blocks_fence": "",
    "blocks_without_fence": NEEDS["blocks"],
    "constant_path": "ld.global.nc.v4",
}


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("order", ORDERS)
def test_order_is_proved_under_every_seed(instructions, order: str, copies: str) -> None:
    """A race is found whatever the order of this run was, and what is ordered is none."""
    for seed in range(8):
        instructions.set(seed=seed, copies=copies)
        counter, out = torch.zeros(4, dtype=torch.int32), torch.zeros(1024, dtype=torch.int32)
        error = instructions.run("run_ordered", list(ORDERS).index(order), counter, out, outputs=2)
        if ORDERS[order] == "":
            assert error == ""
        else:
            assert "a race: " in error
            assert ORDERS[order] in error
            assert len(re.findall(r"instructions\.cu:\d+", error)) == 2, "both places are named"


@pytest.mark.parametrize("seed", SEEDS)
def test_where_lanes_may_meet(instructions, seed: int) -> None:
    """Aligned instructions at one place of the code, whatever the way there; barriers by whole warps."""
    instructions.set(seed=seed)
    errors = [instructions.run("run_met", meeting, torch.zeros(64, dtype=torch.int32)) for meeting in range(3)]
    assert re.fullmatch(r"lanes of a warp met at instructions\.cu:(\d+) and at instructions\.cu:(?!\1)\d+", errors[0])
    assert errors[1] == ""
    assert "complete with 16 lanes of warp" in errors[2]


@pytest.mark.parametrize(
    ("threads", "shared_bytes", "capability", "sentence"),
    [
        (64, 0, (8, 0), ""),
        (65, 0, (8, 0), "bounded: blocks of 65 threads, and its __launch_bounds__ are 64"),
        (32, 99 * 1024, (8, 6), ""),
        (32, 99 * 1024 + 4, (8, 6), "bounded: 101380 bytes of shared memory, and a block of sm_86 has at most 101376"),
        (32, 163 * 1024, (8, 0), ""),
        (32, 163 * 1024 + 4, (8, 0), "and a block of sm_80 has at most 166912"),
        (32, 227 * 1024, (9, 0), ""),
        (32, 227 * 1024 + 4, (9, 0), "and a block of sm_90 has at most 232448"),
        (32, 100 * 1024, (12, 0), "and a block of sm_120 has at most 101376"),
    ],
)
def test_limits_of_a_launch(instructions, threads: int, shared_bytes: int, capability, sentence: str) -> None:
    instructions.set(capability=capability)
    error = instructions.run("run_bounded", threads, shared_bytes, torch.zeros(1, dtype=torch.int32))
    assert error.endswith(sentence)
    assert (error == "") == (sentence == "")


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 1), (2, 2), (3, 1), (8, 8), (32, 32)])
def test_counters(instructions, stride: int, wavefronts: int) -> None:
    """Words with a stride: bank conflicts, and sectors of 32 bytes, against the fewest possible."""
    instructions.set(count=True)
    source = torch.zeros(32 * stride, dtype=torch.int32)
    assert instructions.run("run_strided", source, stride, torch.zeros(32, dtype=torch.int32)) == ""
    counts = {c["instruction"]: c for c in instructions.counters() if c["kernel"] == "strided"}
    for name in ("ld.shared", "st.shared"):
        assert (counts[name]["wavefronts"], counts[name]["fewest_wavefronts"]) == (wavefronts, 1)
    load, store = counts["ld.global"], counts["st.global"]
    assert (load["sectors"], load["fewest_sectors"]) == (min(4 * stride, 32), 4)
    assert (store["sectors"], store["fewest_sectors"]) == (4, 4)
    assert (load["read"], store["written"]) == (128, 128)
    assert counts["bar.warp.sync"]["count"] == load["count"] == 1
    assert all("instructions.cu" in c["place"] for c in counts.values())
