"""Each emulated instruction against the PTX ISA's definition.

Fragment layouts are spelled out here as the PTX ISA's section "Matrix fragments for mma" has them.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from machine import COPIES, ROOT
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


@pytest.mark.parametrize("copies", COPIES)
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
def test_cp_async(instructions, name: str, size: int, read: int, copies: str) -> None:
    """`read` bytes of the source, which need have no more, then zeros; what lies beyond is still poison."""
    source = torch.arange(1, max(read, 1) + 1, dtype=torch.uint8)
    out = torch.zeros(16, dtype=torch.uint8)
    instructions.set(copies=copies)
    assert instructions.run(name, source, read, out) == ""
    expected = torch.full((16,), 255, dtype=torch.uint8)
    expected[:size] = 0
    expected[:read] = source[:read]
    assert torch.equal(out, expected)


def test_loads_and_stores_of_16_bytes(instructions) -> None:
    source = torch.arange(32 * 4, dtype=torch.int32)
    out = torch.zeros(32 * 4, dtype=torch.int32)
    assert instructions.run("run_global_v4", source, out) == ""
    assert torch.equal(out, source)


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("early", range(3))
def test_cp_async_wait_group_waits_for_all_but_the_newest(instructions, early: int, copies: str) -> None:
    """Three groups, of which the one before the newest two, two, three have landed; reading another is a race."""
    source = torch.arange(3 * 4, dtype=torch.int32).view(3, 4)
    out = torch.zeros(3, 4, dtype=torch.int32)
    instructions.set(copies=copies)
    error = instructions.run("run_copy_groups", source, early, out)
    if early == 0:
        assert error == ""
        assert torch.equal(out, source)
    else:
        assert re.search(
            r"a race: ld.shared at .*instructions.cu:\d+ reads where cp.async.* is still on its way", error
        )


def test_when_copies_land(instructions) -> None:
    """At once, when they are waited for, or at times that differ: by what they copy of a source that is rewritten."""
    landed = {copies: set() for copies in COPIES}
    for copies, seed in itertools.product(COPIES, range(16)):
        source, out = torch.zeros(8, 4, dtype=torch.int32), torch.full((8, 4), -7, dtype=torch.int32)
        instructions.set(seed=seed, copies=copies)
        assert instructions.run("run_rewritten_source", source, out, outputs=2) == ""
        landed[copies].add(tuple(out[:, 0].tolist()))
    assert landed["at once"] == {(0,) * 8}
    assert landed["late"] == {(1,) * 8}
    assert len(landed["random"]) > 4


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
DECLARED = re.compile(
    r"^(?:LLMKERN_PTX|(?:__device__ __forceinline__|inline|LLMKERN_SIMT_INLINE) [\w ]+?) ?(\w+)\(", re.MULTILINE
)


@pytest.mark.parametrize("header", ["cuda/common/ptx.cuh", "simt/cuda.h"])
def test_every_instruction_is_tested(header: str) -> None:
    names = set(DECLARED.findall((ROOT / "csrc" / header).read_text())) - {"exchange", "reduce"}
    assert len(names) > 15
    kernels = (ROOT / "tests" / "simt" / "instructions.cu").read_text()
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", kernels)] == []


@pytest.mark.parametrize("seed", SEEDS)
def test_named_barrier(instructions, seed: int) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    instructions.set(seed=seed)
    assert instructions.run("run_named_barrier", out) == ""
    assert torch.equal(out, torch.arange(63, 31, -1, dtype=torch.int32))


def test_products_are_contracted(instructions) -> None:
    """As nvcc does: a product that is subtracted from is not rounded before."""
    values, out = torch.tensor([1 + 2**-12, 1 + 2**-12, 1 + 2**-11]), torch.zeros(1)
    assert instructions.run("run_contracted", values, out) == ""
    assert out.item() == 2**-24


def test_approximations_err_within_their_bounds(instructions) -> None:
    """PTX's: 2⁻²² of ex2.approx, 2⁻²²·⁹ of rsqrt.approx, 2⁻²³ of rcp.approx, 2⁻¹¹ of tanh.approx; by the salt."""
    bounds = torch.tensor([2.0**-22, 2.0**-11, 2.0**-23, 2.0**-22.9], dtype=torch.float64)
    x = torch.linspace(0.1, 20, 32)
    wide = x.double()
    exact = torch.stack([wide.exp2(), wide.tanh(), 1 / wide, wide.rsqrt()], -1)
    drawn = []
    for salt in range(1, 9):
        out = torch.zeros(32, 6)
        instructions.set(approximate=salt)
        assert instructions.run("run_arithmetic", x, out) == ""
        drawn.append((out[:, :4].double() - exact) / exact)
    errors = torch.stack(drawn)
    assert bool((errors.abs() <= bounds + 2.0**-24).all())  # the result itself is rounded
    assert bool((errors.abs().amax((0, 1)) > 0.7 * bounds).all())
    assert bool((errors.std(0) > 0).any())


@pytest.mark.parametrize(("capability", "architecture"), [((8, 0), "Ampere"), ((9, 0), "Hopper")])
@pytest.mark.parametrize("name", ["mma_m16n8k16_bf16", "mma_m16n8k16_f16", "mma_m16n8k8_bf16", "mma_m16n8k8_f16"])
def test_tensor_cores_to_the_bit(instructions, name: str, capability: tuple[int, int], architecture: str) -> None:
    """As mmasim has them (Xie et al. 2025, arXiv:2511.10909), which was checked against the hardware."""
    mmasim = pytest.importorskip("mmasim.nv_ptx.sim")
    dtype, k, place_a, place_b = PRODUCTS[name]
    kind = name.rsplit("_", 1)[-1]
    oracle = mmasim.MMA(architecture, f"m16n8k{k}.f32.{kind}.{kind}.f32")
    generator = torch.Generator().manual_seed(0)
    instructions.set(capability=capability)
    for spread in (0.0, 1.0, 4.0, 12.0 if dtype == torch.float16 else 60.0):
        a, b, c = (
            torch.randn(shape, generator=generator) * torch.exp2(torch.randn(shape, generator=generator) * spread)
            for shape in ((16, k), (k, 8), (16, 8))
        )
        a, b = a.clamp(-6e4, 6e4).to(dtype), b.clamp(-6e4, 6e4).to(dtype)
        a[3], b[:, 5], c[9] = 0, 0, 0
        d = fragments(c, c_16x8, 4)
        assert instructions.run(name, fragments(a, place_a, k // 2), fragments(b, place_b, k // 4), d) == ""
        assert torch.equal(d.view(torch.int32), fragments(oracle(a, b, c), c_16x8, 4).view(torch.int32))
