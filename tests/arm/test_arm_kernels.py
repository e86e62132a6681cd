"""The CPU kernels on Arm's instruction sets, executed by qemu: the shared cases of every op that has a CPU kernel."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from emulator import CPUS, Emulator
from torch import Tensor

from llmkern import dispatch
from llmkern.testing.case import Case, Make, cases
from llmkern.testing.cases.quantized_linear import KINDS, random_packed
from llmkern.testing.compare import as_list, assert_as_accurate, assert_same_bits, upcast
from llmkern.testing.judge import Judge, baseline, reference, written_tensors

# In Python, of products and of kernels that have cases here.
COMPOSED = ("linear_cross_entropy", "linear_jsd", "linear_kl_div")
OPS = [
    op
    for op in dispatch.ops()
    if op not in COMPOSED
    and not op.endswith("_backward")
    and any(i.backend.name == "cpu" for i in dispatch.implementations(op))
]
# Of whole layers: their launchers have cases of their own, and qemu is slow.
LAYERS = re.compile(
    "(decode|7-tokens|int8-w8a8|int8-w8a16|int8-cache|bert-2x7|bert-int8-w8a8|gpt2-masked|mixtral-masked|bart-kept)$"
)


def judge(emulator: Emulator, case: Case) -> None:
    """The result is right on every CPU; one with the bits of one that was judged is not judged again."""
    judged, verdict = [], Judge(case, case.make())
    for cpu in CPUS:
        emulator.use(cpu)
        with emulator.memory():
            call = case.make()
        out = emulator.op(case.op, call)
        outputs = [*as_list(out), *written_tensors(case.op, call)]
        if any(same_bits(outputs, before) for before in judged):
            continue
        try:
            verdict.assert_right(call, out)
        except AssertionError as error:
            raise AssertionError(f"on {cpu}: {error}") from error
        judged.append(outputs)


def same_bits(outputs: list[Tensor], expected: list[Tensor]) -> bool:
    try:
        assert_same_bits(outputs, expected)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("cpu", CPUS)
def test_the_best_instruction_set_is_chosen_and_any_that_the_cpu_has_can_be(emulator: Emulator, cpu: str) -> None:
    emulator.use(cpu)
    best, names = CPUS[cpu], list(CPUS.values())
    assert emulator.isa() == best
    for name in names:
        assert emulator.set_isa(name) == (names.index(name) <= names.index(best))
    assert not emulator.set_isa("avx2")
    assert emulator.isa() == best


def taken(case: Case) -> bool:
    return case.op != "layers_" or (case.dtype != torch.float16 and LAYERS.match(case.name) is not None)


@pytest.mark.parametrize("case", filter(taken, (c for op in OPS for c in cases(op))), ids=lambda c: f"{c.op}-{c}")
def test_cases(emulator: Emulator, case: Case) -> None:
    judge(emulator, case)


each_cpu = pytest.mark.parametrize("cpu", CPUS)
# On either side of where kernels change: rows that stream the weight, blocks of 8 rows by sdot and of 10 by smmla and
# bfmmla, an odd row beside pairs.
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 13, 16, 17, 19, 20, 21, 33)


def codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@each_cpu
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 17), (50, 200), (17, 63), (9, 65), (8, 577), (33, 1600)])
def test_sums_are_exact_for_every_number_of_rows(emulator: Emulator, cpu: str, n: int, k: int) -> None:
    emulator.use(cpu)
    with emulator.memory():
        a, w = codes(max(ROWS), k), codes(n, k)
    none = dict.fromkeys(("a_scale", "w_scale", "bias", "residual"))
    expected = (a.double() @ w.double().T).to(torch.int32)
    for rows in ROWS:
        call = {"a_q": a[:rows], "w_q": w, **none, "activation": "none", "out_dtype": torch.int32}
        assert torch.equal(emulator.op("int8_matmul", call), expected[:rows]), rows


@each_cpu
@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("rows", [8, 9])
def test_the_largest_sums(emulator: Emulator, cpu: str, rows: int, value: int) -> None:
    """As long as s32 holds them, over many parts of k; of both signs."""
    emulator.use(cpu)
    with emulator.memory():
        a, w = torch.full((rows, 131071), -128, dtype=torch.int8), torch.full((3, 131071), value, dtype=torch.int8)
    none = dict.fromkeys(("a_scale", "w_scale", "bias", "residual"))
    call = {"a_q": a, "w_q": w, **none, "activation": "none", "out_dtype": torch.int32}
    assert emulator.op("int8_matmul", call).eq(-128 * value * 131071).all()


def linear(make: Make, rows: int, n: int, k: int) -> dict[str, Any]:
    x, weight = make.randn(rows, k), make.randn(n, k, scale=k**-0.5)
    return {"x": x, "weight": weight, "bias": make.randn(n), "activation": "none"}


def weight_only(make: Make, rows: int, n: int, k: int) -> dict[str, Any]:
    w_q = make.randint(-128, 128, n, k, dtype=torch.int8)
    call = {"x": make.randn(rows, k), "w_q": w_q, "w_scale": torch.full((n, 1), k**-0.5 / 73), "bias": make.randn(n)}
    return call | {"activation": "none", "scheme": "w8a16"}


@each_cpu
@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights(emulator: Emulator, cpu: str, kind: str) -> None:
    """Right, and a row has the bits that it has alone."""
    emulator.use(cpu)
    make = Make(torch.float32, "cpu", seed=0)
    with emulator.memory():
        packed = random_packed(make, kind, 37, 512)
        groups = {name: packed.tensors.get(name) for name in ("zero", "offset", "super_scale", "super_offset")}
        call = {"x": make.randn(11, 512), "codes": packed.codes, "scale": packed.scale, **groups, "bias": None}
        call |= {"residual": make.randn(11, 37), "code": packed.code, "n": packed.n, "activation": "silu"}
        call["scheme"] = "a8"
    op = "quantized_linear"
    every = emulator.op(op, call)
    assert_as_accurate(every, baseline=baseline(op, call), exact=reference(op, upcast(call)))
    for rows in (1, 3, 8):
        alone = emulator.op(op, call | {name: call[name][:rows] for name in ("x", "residual")})
        assert_same_bits(alone, every[:rows])


@each_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(3, 5), (17, 64), (9, 577)])
@pytest.mark.parametrize("build", [linear, weight_only], ids=["linear", "int8_linear"])
def test_products_of_every_number_of_rows(emulator: Emulator, cpu: str, build, n: int, k: int, dtype) -> None:
    """Right, and a row's bits depend on nothing but whether rows are few."""
    emulator.use(cpu)
    op = "linear" if build is linear else "int8_linear"
    with emulator.memory():
        call = build(Make(dtype, "cpu", seed=0), max(ROWS), n, k)
    every = emulator.op(op, call)
    assert_as_accurate(every, baseline=baseline(op, call), exact=reference(op, upcast(call)))
    few = emulator.op(op, call | {"x": call["x"][:4]})
    assert_as_accurate(few, baseline=baseline(op, call)[:4], exact=reference(op, upcast(call))[:4])
    for rows in ROWS:
        out = emulator.op(op, call | {"x": call["x"][:rows]})
        assert_same_bits(out, few[:rows] if rows <= 4 else every[:rows])


@each_cpu
def test_every_half_and_every_rounding_to_half(emulator: Emulator, cpu: str) -> None:
    """rms_norm with mean square 1 and a bias of x is a conversion: of all 65,536 halves, and to half and bfloat16."""
    emulator.use(cpu)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)

    def converted(values: Tensor, dtype: torch.dtype) -> Tensor:
        with emulator.memory():
            call = {"x": torch.zeros(1, len(values), dtype=dtype), "bias": values.clone(), "weight": None}
        return emulator.op("rms_norm", call | {"eps": 1.0, "weight_offset": 0.0})[0]

    for dtype in (torch.float16, torch.bfloat16):
        every = patterns.view(dtype)
        assert_same_bits(converted(every, torch.float32), every.float())
        finite = every[every.isfinite()].float()
        ties = (finite[:-1] + finite[1:]) / 2  # halfway between neighbours: to even
        for values in (finite, ties, torch.tensor([65519.0, 65520.0, 65536.0, 3.3895314e38, -3.4e38])):
            assert_same_bits(converted(values, dtype), values.to(dtype))


def test_a_call_that_reads_elsewhere_is_an_error_and_the_next_one_is_served(emulator: Emulator) -> None:
    emulator.use("cortex-a53")
    outside = torch.zeros(8)
    call = {"x": outside, "weight": None, "bias": None, "eps": 1.0, "weight_offset": 0.0}
    with pytest.raises(AssertionError, match=f"cortex-a53 has stopped: a wrong address at {outside.data_ptr():#x}"):
        emulator.op("rms_norm", call)
    emulator.use("cortex-a53")
    with emulator.memory():
        call["x"] = torch.ones(8)
    assert emulator.op("rms_norm", call).eq(0.5**0.5).all()
