"""Each emulated instruction against the PTX ISA's definition, and each rule of the machine against its breaking.

Fragment layouts are spelled out here as the PTX ISA's section "Matrix fragments for mma" has them.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from machine import ROOT
from torch import Tensor

SEEDS = (0, 1, 7)
POISON = -1  # of int32: all bits set


def group(lane: int) -> int:
    """groupID = %laneid >> 2"""
    return lane >> 2


def in_group(lane: int) -> int:
    """threadID_in_group = %laneid % 4"""
    return lane % 4


# Element i of a lane's fragment: (row, column) of the matrix.
def a_16x16_of_16_bits(lane: int, i: int) -> tuple[int, int]:
    row = group(lane) if 0 <= i < 2 or 4 <= i < 6 else group(lane) + 8
    return row, in_group(lane) * 2 + (i & 1) + (0 if i < 4 else 8)


def b_16x8_of_16_bits(lane: int, i: int) -> tuple[int, int]:
    return in_group(lane) * 2 + (i & 1) + (0 if i < 2 else 8), group(lane)


def a_16x8_of_16_bits(lane: int, i: int) -> tuple[int, int]:
    return group(lane) + (0 if i < 2 else 8), in_group(lane) * 2 + (i & 1)


def b_8x8_of_16_bits(lane: int, i: int) -> tuple[int, int]:
    return in_group(lane) * 2 + i, group(lane)


def a_16x32_of_8_bits(lane: int, i: int) -> tuple[int, int]:
    row = group(lane) if 0 <= i < 4 or 8 <= i < 12 else group(lane) + 8
    return row, in_group(lane) * 4 + (i & 3) + (0 if i < 8 else 16)


def b_32x8_of_8_bits(lane: int, i: int) -> tuple[int, int]:
    return in_group(lane) * 4 + (i & 3) + (0 if i < 4 else 16), group(lane)


def a_16x16_of_8_bits(lane: int, i: int) -> tuple[int, int]:
    return group(lane) + (0 if i < 4 else 8), in_group(lane) * 4 + (i & 3)


def b_16x8_of_8_bits(lane: int, i: int) -> tuple[int, int]:
    return in_group(lane) * 4 + i, group(lane)


def c_16x8(lane: int, i: int) -> tuple[int, int]:
    return group(lane) + (0 if i < 2 else 8), in_group(lane) * 2 + (i & 1)


PRODUCTS = {
    "mma_m16n8k16_bf16": (torch.bfloat16, 16, a_16x16_of_16_bits, b_16x8_of_16_bits),
    "mma_m16n8k16_f16": (torch.float16, 16, a_16x16_of_16_bits, b_16x8_of_16_bits),
    "mma_m16n8k8_bf16": (torch.bfloat16, 8, a_16x8_of_16_bits, b_8x8_of_16_bits),
    "mma_m16n8k8_f16": (torch.float16, 8, a_16x8_of_16_bits, b_8x8_of_16_bits),
    "mma_m16n8k32_s8": (torch.int8, 32, a_16x32_of_8_bits, b_32x8_of_8_bits),
    "mma_m16n8k16_s8": (torch.int8, 16, a_16x16_of_8_bits, b_16x8_of_8_bits),
}


def fragments(matrix: Tensor, place, count: int) -> Tensor:
    """[32 lanes, count]: each lane's elements of the matrix."""
    return torch.stack([torch.stack([matrix[place(lane, i)] for i in range(count)]) for lane in range(32)])


@pytest.mark.parametrize("name", PRODUCTS)
def test_mma(instructions, name: str) -> None:
    dtype, k, place_a, place_b = PRODUCTS[name]
    # Small integers: every order of summation gives the same.
    a, b = (torch.randint(-8, 8, shape).to(dtype) for shape in ((16, k), (k, 8)))
    accumulator = torch.int32 if dtype == torch.int8 else torch.float32
    c = torch.randint(-100, 100, (16, 8)).to(accumulator)
    d = fragments(c, c_16x8, 4)
    assert instructions.run(name, fragments(a, place_a, k // 2), fragments(b, place_b, k // 4), d) == ""
    expected = a.double() @ b.double() + c.double()
    assert torch.equal(d.double(), fragments(expected, c_16x8, 4))


@pytest.mark.parametrize(("matrices", "trans"), [(1, False), (2, False), (4, False), (2, True), (4, True)])
def test_ldmatrix(instructions, matrices: int, trans: bool) -> None:
    """Row r of matrix i comes from the address of lane 8 i + r; lane l gets (l / 4, 2 (l % 4)) and the next."""
    shared = torch.arange(32 * 8, dtype=torch.int16).view(32, 8)
    row = torch.randperm(32).to(torch.int32)
    out = torch.zeros(32, matrices, 2, dtype=torch.int16)
    suffix = "_trans" if trans else ""
    assert instructions.run(f"ldmatrix_x{matrices}{suffix}", shared, row, out) == ""
    for lane, i, j in itertools.product(range(32), range(matrices), range(2)):
        matrix = shared[row[8 * i : 8 * i + 8].long()]
        at = (lane // 4, 2 * (lane % 4) + j)
        assert out[lane, i, j] == matrix[at[::-1] if trans else at]


@pytest.mark.parametrize(("name", "matrices", "trans"), [("x2", 2, False), ("x4", 4, False), ("x4_trans", 4, True)])
def test_stmatrix(instructions, name: str, matrices: int, trans: bool) -> None:
    registers = torch.arange(32 * matrices * 2, dtype=torch.int16).view(32, matrices, 2)
    row = torch.randperm(32).to(torch.int32)
    out = torch.zeros(32, 8, dtype=torch.int16)
    assert instructions.run(f"stmatrix_{name}", registers, row, out) == ""
    expected = torch.full((32, 8), -1, dtype=torch.int16)
    for lane, i, j in itertools.product(range(32), range(matrices), range(2)):
        at = (lane // 4, 2 * (lane % 4) + j)
        r, column = at[::-1] if trans else at
        expected[row[8 * i + r], column] = registers[lane, i, j]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("name", "size", "read"),
    [
        ("cp_async_ca_4", 4, 4),
        ("cp_async_ca_4", 4, 1),
        ("cp_async_ca_8", 8, 8),
        ("cp_async_ca_8", 8, 0),
        ("cp_async_cg_16", 16, 16),
        ("cp_async_cg_16", 16, 5),
        ("cp_async_cg_16", 16, 0),
    ],
)
def test_cp_async(instructions, name: str, size: int, read: int, late: bool) -> None:
    """`read` bytes of the source, which need have no more, then zeros; shared memory is poisoned before."""
    source = torch.arange(1, max(read, 1) + 1, dtype=torch.uint8)
    out = torch.zeros(2, 16, dtype=torch.uint8)
    instructions.set(late_copies=late)
    assert instructions.run(name, source, read, out) == ""
    before = torch.full((16,), 255, dtype=torch.uint8)
    expected = before.clone()
    expected[:size] = 0
    expected[:read] = source[:read]
    assert torch.equal(out[1], expected)
    assert torch.equal(out[0], before if late else expected)


def test_loads_and_stores_of_16_bytes(instructions) -> None:
    source = torch.arange(32 * 4, dtype=torch.int32)
    out = torch.zeros(32 * 4, dtype=torch.int32)
    assert instructions.run("run_global_v4", source, out) == ""
    assert torch.equal(out, source)


def test_cp_async_wait_group_waits_for_all_but_the_newest(instructions) -> None:
    source = torch.arange(3 * 4, dtype=torch.int32).view(3, 4)
    out = torch.zeros(3, 3, 4, dtype=torch.int32)
    instructions.set(late_copies=True)
    assert instructions.run("run_copy_groups", source, out) == ""
    for landed in (1, 2, 3):
        assert torch.equal(out[landed - 1, :landed], source[:landed])
        assert bool((out[landed - 1, landed:] == POISON).all())


@pytest.mark.parametrize("seed", SEEDS)
def test_exchanges(instructions, seed: int) -> None:
    values = torch.randint(-1000, 1000, (32,), dtype=torch.int32)
    values[7] = 7
    out = torch.zeros(11, 32, dtype=torch.int32)
    instructions.set(seed=seed)
    assert instructions.run("run_exchanges", values, 5, out) == ""
    lane = torch.arange(32)
    ballot = sum(1 << i for i in range(32) if values[i] > 0)
    # prmt's bytes 0 to 3 are the first operand's, 4 to 7 the second's; the selector's lowest digit is for byte 0.
    operands = torch.stack([values, ~values], -1).view(torch.uint8)
    permuted = operands[:, [2, 5, 1, 4]]
    expected = [
        values[lane ^ 5],
        torch.where(lane >= 5, values[lane - 5], values),
        torch.where(lane < 27, values[(lane + 5) % 32], values),
        values[5].expand(32),
        torch.full((32,), ballot - (1 << 32 if ballot >= 1 << 31 else 0)),
        values.max().expand(32),
        values.min().expand(32),
        values.sum().expand(32),
        permuted.view(32, 4).contiguous().view(torch.int32).flatten(),
        torch.full((32,), 1 + 2),
        lane,
    ]
    assert torch.equal(out, torch.stack([row.to(torch.int32) for row in expected]))


def test_arithmetic(instructions) -> None:
    special = [1e-40, -1e-40, 3e38, 0.5, 1.5, -2.5, 0.0, float("inf"), float("-inf"), float("nan")]
    x = torch.cat([torch.linspace(-130, 120, 22), torch.tensor(special)])
    out = torch.zeros(32, 6)
    assert instructions.run("run_arithmetic", x, out) == ""
    power = torch.exp2(x.double()).float()
    power[power.abs() < 2.0**-126] = 0  # ftz
    torch.testing.assert_close(out[:, 0], power, equal_nan=True)
    torch.testing.assert_close(out[:, 1], torch.tanh(x), equal_nan=True)
    inverse = 1 / torch.where(x.abs() < 2.0**-126, x * 0, x)
    inverse[inverse.abs() < 2.0**-126] *= 0
    torch.testing.assert_close(out[:, 2], inverse, equal_nan=True)
    torch.testing.assert_close(out[:, 3], torch.rsqrt(x), equal_nan=True)
    assert torch.equal(out[:, 4].view(torch.int32), (-x).view(torch.int32))
    assert torch.equal(out[:, 5], torch.where(x.abs() < 1e6, x, 0).round())  # to even


# Every function of ptx.cuh, and every one that cuda.h stands in for, is called by instructions.cu.
WITHOUT_EFFECT = {"__threadfence"}  # blocks and threads run one at a time
DECLARED = re.compile(r"^(?:LLMKERN_PTX|(?:__device__ __forceinline__|inline) [\w ]+?) ?(\w+)\(", re.MULTILINE)


@pytest.mark.parametrize("header", ["cuda/common/ptx.cuh", "simt/cuda.h"])
def test_every_instruction_is_tested(header: str) -> None:
    names = set(DECLARED.findall((ROOT / "csrc" / header).read_text())) - WITHOUT_EFFECT
    assert len(names) > 15
    kernels = (ROOT / "tests" / "simt" / "instructions.cu").read_text()
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", kernels)] == []


@pytest.mark.parametrize("seed", SEEDS)
def test_named_barrier(instructions, seed: int) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    instructions.set(seed=seed)
    assert instructions.run("run_named_barrier", out) == ""
    assert torch.equal(out, torch.arange(63, 31, -1, dtype=torch.int32))


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
