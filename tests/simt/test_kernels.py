"""The CUDA kernels, executed by the SIMT machine: each op's shared cases, and shapes that choose every variant."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from judging import CUDA, SEEDS, judge

from llmkern.testing.case import Case, Make, cases
from llmkern.testing.cases.attention import random_call
from llmkern.testing.compare import assert_same_bits
from llmkern.testing.judge import assert_accurate

# Rows on either side of the number of SMs, 4; hidden sizes for a warp, for blocks and beyond the registers of one,
# by vectors and element by element.
GRID = [(rows, hidden) for rows in (1, 3, 199) for hidden in (1, 7, 8, 300, 577, 4096)]
GRID += [(rows, hidden) for rows in (1, 7) for hidden in (520, 1100, 2500, 20000, 20001, 40000)]
GRID_OPS = ("layer_norm", "add_rms_norm_quant", "quantize_int8", "swiglu", "swiglu_quant", "gelu")
# M on either side of every tile's; N and K with and without a remainder, rows aligned to 16 bytes or not.
# With few SMs the large tiles are chosen, with many the small ones; up to 16 rows none are.
SWEPT = [
    pytest.param((m, n, k), sm_count, id=f"{m}x{n}x{k}-{sm_count}")
    for m in (*range(1, 34), 127, 128, 129)
    for n, k in ((33, 80), (130, 67))
    for sm_count in ((1, 1000) if m > 16 else (1,))
]


def at_shape(op: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Case:
    """One of the op's own cases, with another shape."""
    case = next(case for case in cases(op) if "3x7" in case.name and case.dtype == dtype)

    def change(build: functools.partial) -> functools.partial:
        keywords = {name: change(v) if isinstance(v, functools.partial) else v for name, v in build.keywords.items()}
        return functools.partial(
            build.func, *build.args, **(keywords | ({"shape": shape} if "shape" in keywords else {}))
        )

    changed = dataclasses.replace(case, build=change(case.build), name="x".join(map(str, shape)))
    assert shape in {tuple(value.shape) for value in changed.make().values() if isinstance(value, torch.Tensor)}
    return changed


def of_size(own: Case, size: tuple[int, int, int]) -> Case:
    """One of the cases of an op with `rows`, `n` and `k`, in another size."""
    m, n, k = size
    assert isinstance(own.build, functools.partial)
    build = functools.partial(own.build.func, **(own.build.keywords | {"rows": (m,), "n": n, "k": k}))
    return dataclasses.replace(own, build=build)


def product(size: tuple[int, int, int], dtype: torch.dtype) -> Case:
    wanted = "s32" if dtype == torch.int32 else "130"
    own = next(c for c in cases("int8_matmul") if wanted in c.name and dtype in (torch.int32, c.dtype))
    return of_size(own, size)


def weight_only(size: tuple[int, int, int], dtype: torch.dtype) -> Case:
    own = next(c for c in cases("int8_linear") if c.name.startswith("silu-w8a16") and c.dtype == dtype)
    return of_size(own, size)


@pytest.mark.parametrize("case", [case for op in CUDA for case in cases(op)], ids=lambda case: f"{case.op}-{case}")
def test_cases(operators, case: Case) -> None:
    judge(operators, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", GRID, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("op", GRID_OPS)
def test_every_size_of_row(operators, op: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    judge(operators, at_shape(op, dtype, shape))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16])
@pytest.mark.parametrize(("size", "sm_count"), SWEPT)
def test_every_number_of_rows_of_a_product(operators, size: tuple[int, int, int], sm_count: int, dtype) -> None:
    judge(operators, product(size, dtype), sm_count=sm_count)


# Tile, and M, N and K for which one SM gets it: with rows aligned to 16 bytes or not, stored by 16 bytes or one by one,
# and with several blocks.
CODE_TILES = [((128, 256), size) for size in ((120, 246, 336), (250, 504, 96), (120, 250, 67))]
CODE_TILES += [((128, 128), size) for size in ((250, 120, 96), (130, 66, 67))]
HALF_TILES = [((128, 128), size) for size in ((250, 120, 96), (120, 126, 208), (130, 66, 67))]
HALF_TILES += [((64, 64), size) for size in ((17, 33, 80), (60, 66, 208), (129, 40, 67))]


def chosen_tile(size: tuple[int, int, int], element_bytes: int, sm_count: int) -> tuple[int, int]:
    plans = pytest.importorskip("llmkern._C", reason="llmkern._C was not built")
    return plans.plan("int8_matmul", list(size), element_bytes, True, sm_count, 90)["tile"]


@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16])
@pytest.mark.parametrize(("tile", "size"), CODE_TILES)
def test_tiles_of_codes(operators, tile: tuple[int, int], size: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert chosen_tile(size, 1, 1) == tile
    judge(operators, product(size, dtype), sm_count=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tile", "size"), HALF_TILES)
def test_tiles_of_weight_only(operators, tile: tuple[int, int], size: tuple[int, int, int], dtype) -> None:
    assert chosen_tile(size, 2, 1) == tile
    judge(operators, weight_only(size, dtype), sm_count=1)


def test_sections_of_blocks_cover_the_result(operators) -> None:
    """Seventeen rows of blocks, one more than a section has, each with columns of its own."""
    size = (17 * 64 - 3, 130, 16)
    assert chosen_tile(size, 1, 1000) == (64, 64)
    judge(operators, product(size, torch.int32), sm_count=1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sm_count", [1, 1000])
@pytest.mark.parametrize("size", [(17, 136, 96), (129, 136, 96), (129, 131, 70)], ids=str)
def test_epilogues_of_tiles(operators, size: tuple[int, int, int], sm_count: int, dtype: torch.dtype) -> None:
    """Bias, activation and residual, eight columns at a time and one by one, behind large and small tiles."""
    own = next(c for c in cases("int8_matmul") if c.name.startswith("fused-gelu_tanh") and c.dtype == dtype)
    judge(operators, of_size(own, size), sm_count=sm_count)


# Parts of K by the decode kernels and by small tiles, the last of them shorter; N and K with and without remainders.
PARTS = [(m, n, k) for m in (5, 16) for n, k in ((33, 8300), (48, 12288))]
PARTS += [(m, n, k) for m in (17, 70) for n, k in ((66, 2100), (72, 3136))]


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", PARTS, ids=lambda size: "x".join(map(str, size)))
def test_parts_of_a_product(operators, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    judge(operators, product(size, dtype), sm_count=1000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "size", [(m, n, k) for m in range(1, 17) for n, k in ((33, 80), (16, 2200), (35, 67))], ids=str
)
def test_every_number_of_rows_of_weight_only(operators, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    judge(operators, weight_only(size, dtype))


@pytest.mark.parametrize("size", [(5, 33, 8300), (16, 48, 12288), (17, 66, 2100), (70, 72, 3136)], ids=str)
def test_parts_of_weight_only_have_the_same_bits_in_every_order(operators, size: tuple[int, int, int]) -> None:
    case = weight_only(size, torch.bfloat16)
    judge(operators, case, sm_count=1000)
    call = case.make()
    results = []
    for seed in SEEDS:
        operators.set(seed=seed, sm_count=1000)
        results.append(operators.op("int8_linear", call))
    assert_same_bits(results[1], results[0])


def test_every_code_is_converted_exactly(operators) -> None:
    """Each of the 256 codes, against one row of the identity at a time."""
    codes = torch.arange(-128, 128).to(torch.int8).view(1, 256)
    for dtype in (torch.bfloat16, torch.float16):
        for first in range(0, 256, 16):
            x = torch.eye(256, dtype=dtype)[first : first + 16].contiguous()
            call = {"x": x, "w_q": codes, "w_scale": torch.ones(1, 1), "bias": None}
            operators.set()
            out = operators.op("int8_linear", call | {"activation": "none", "scheme": "w8a16"})
            assert out.flatten().tolist() == list(range(first - 128, first - 112))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "strided"])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7), (5, 300), (2, 3, 64), (3, 2056)], ids=str)
@pytest.mark.parametrize(
    ("op", "extra"),
    [
        ("swiglu_backward", {}),
        ("gelu_backward", {"approximate": "none"}),
        ("gelu_backward", {"approximate": "tanh"}),
    ],
    ids=["swiglu", "gelu", "gelu-tanh"],
)
def test_backward_of_activations(operators, op: str, extra: dict, shape: tuple, dense: bool, dtype) -> None:
    """Around zero, in the tails and far beyond them."""
    make, hidden = Make(dtype, "cpu", seed=0), shape[-1]
    names = ("dy", "gate", "up") if op == "swiglu_backward" else ("dy", "x")
    call = {name: make.randn(*shape) if dense else make.randn(*shape[:-1], 2 * hidden)[..., :hidden] for name in names}
    call[names[1]].mul_(torch.logspace(-2, 3, hidden))
    results = []
    for seed in SEEDS:
        operators.set(seed=seed)
        results.append(operators.op(op, call | extra))
    assert_same_bits(results[1], results[0])
    assert_accurate(op, call | extra, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parameters", [True, False], ids=["parameters", "none"])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7), (199, 300), (30, 577), (9, 4096), (9, 20000), (2, 20001)])
@pytest.mark.parametrize("op", ["layer_norm_backward", "rms_norm_backward"])
def test_backward_of_norms(operators, op: str, shape: tuple[int, int], parameters: bool, dtype: torch.dtype) -> None:
    """Each gradient keeps the accuracy rule, and has the same bits in every order of blocks and warps."""
    make = Make(dtype, "cpu", seed=0)
    weight, bias = (make.randn(shape[1]) if parameters else None for _ in range(2))
    call = {"dy": make.randn(*shape), "x": make.randn(*shape, offset=2.0), "weight": weight, "bias": bias, "eps": 1e-6}
    call |= {"weight_offset": 1.0} if op.startswith("rms") else {}
    results = []
    for seed in SEEDS:
        operators.set(seed=seed)
        results.append(operators.op(op, call))
    assert_same_bits(results[1], results[0])
    assert_accurate(op, call, results[0], ["dx", "dweight", "dbias"])


# A call of an operator in which one tensor is elsewhere, and what its binding says.
ELSEWHERE = {
    "layer_norm_backward-dy": ("dy", "dy must have the shape, dtype and device of x"),
    "swiglu_backward-dy": ("dy", "dy must have"),
    "add_rms_norm-residual": ("residual", "residual must have x's shape, dtype and device"),
    "rms_norm-weight": ("weight", "weight must be on x's device"),
    "swiglu-up": ("up", "up must have gate's shape, dtype and device"),
    "attention-k": ("k", "k must be on q's device"),
}


@pytest.mark.parametrize("which", ELSEWHERE)
def test_a_tensor_of_another_device_is_refused(operators, which: str) -> None:
    """By the operator itself, before a kernel reads it: the public functions' checks are not in its way."""
    name, sentence = ELSEWHERE[which]
    op = which.rsplit("-", 1)[0]
    make = Make(torch.bfloat16, "cpu", seed=0)
    x, weight = make.randn(2, 8), make.randn(8)
    calls = {
        "layer_norm_backward": {"dy": x, "x": x, "weight": weight, "bias": weight, "eps": 1e-6},
        "swiglu_backward": {"dy": x, "gate": x, "up": x},
        "add_rms_norm": {"x": x, "residual": x, "weight": weight, "bias": None, "eps": 1e-6, "weight_offset": 0.0},
        "rms_norm": {"x": x, "weight": weight, "bias": None, "eps": 1e-6, "weight_offset": 0.0},
        "swiglu": {"gate": x, "up": x},
        "attention": random_call(make, 3, 5),
    }
    operator = getattr(torch.ops.llmkern_simt, op).default
    call = calls[op] | {name: calls[op][name].to("meta")}
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match=sentence):
        operator.redispatch(cpu, *(call[argument.name] for argument in operator._schema.arguments))


@pytest.mark.parametrize("op", ["quantize_int8", "rms_norm", "swiglu_quant"])
def test_rows_that_threads_cannot_count_are_refused(operators, op: str) -> None:
    """The rows are virtual memory that nobody touches."""
    row = torch.empty(1, 2**30 + 8, dtype=torch.bfloat16)
    names = {"quantize_int8": ["x"], "rms_norm": ["x"], "swiglu_quant": ["gate", "up"]}[op]
    call = dict.fromkeys(names, row) | (
        {"weight": None, "bias": None, "eps": 1e-6, "weight_offset": 0.0} if op == "rms_norm" else {}
    )
    with pytest.raises(RuntimeError, match=f"{names[0]} has rows of 1073741832 elements; at most 1073741824 are taken"):
        operators.op(op, call)
