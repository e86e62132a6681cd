"""The native library: what it links to, how it is missed, and its kernels on every instruction set."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from instruction_sets import assert_right_on_each, here, on
from torch import Tensor

from llmkern import _native, dispatch
from llmkern.config import settings
from llmkern.testing.case import Make, cases
from llmkern.testing.cases.quantized_linear import random_packed
from llmkern.testing.compare import assert_same_bits

ROOT = Path(__file__).parents[2]
built = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))
NATIVE_CASES = [
    pytest.param(case, impl, id=f"{case.op}-{case}")
    for op in dispatch.ops()
    for impl in dispatch.implementations(op)
    if impl.backend.name == "cpu" and not op.endswith("_backward")
    for case in cases(op)
]


def python(code: str, **env: str) -> str:
    """What a fresh interpreter prints."""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@built
@pytest.mark.parametrize(("case", "impl"), NATIVE_CASES)
def test_each_instruction_set_is_as_accurate_as_pytorch(case, impl) -> None:
    """The operator itself, which answers also what the dispatcher refuses because PyTorch is faster."""
    assert_right_on_each(case, case.make, impl.fn)


ROW_OPS = [f"{norm}_norm{quant}" for norm in ("rms", "layer", "add_rms", "add_layer") for quant in ("", "_quant")]
ROW_OPS += ["swiglu", "swiglu_quant", "gelu", "quantize_int8"]


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [1, 3, 8, 17, 63, 65, 577, 9000, 20000])
@pytest.mark.parametrize("op", ROW_OPS)
def test_rows_of_any_length_that_lie_anywhere(op, hidden, dtype) -> None:
    """Longer, too, than what kernels keep on the stack; apart and unaligned; one with an infinity, one of zeros."""
    torch.manual_seed(0)  # of few values PyTorch may happen to hit each
    case = next(case for case in cases(op) if case.dtype == dtype)
    call = case.make()
    for name, value in call.items():
        if isinstance(value, Tensor) and value.dim() > 1:
            rows = torch.randn(4, hidden + 3).to(dtype)
            rows[2] = 0
            if case.rule != "codes":  # which judges values, and there are none in a row that is partly NaN
                rows[1, hidden // 2 + 3] = float("inf")
            call[name] = rows[:, 3:]
        elif isinstance(value, Tensor):
            call[name] = torch.randn(hidden).to(dtype)
    assert_right_on_each(case, lambda: call, dispatch.implementation(op, "cpu").fn)


@built
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"], indirect=True)
def test_every_half_and_every_rounding_to_half(isa) -> None:
    """rms_norm with mean square 1 and a bias of x is a conversion: of all 65,536 halves, and to half and bfloat16."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    random = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    for dtype in (torch.float16, torch.bfloat16):
        every = patterns.view(dtype)
        widened = torch.ops.llmkern.rms_norm(torch.zeros(1, 2**16), None, every, 1.0, 0.0)
        torch.testing.assert_close(widened[0], every.float(), rtol=0, atol=0, equal_nan=True)
        finite = every[every.isfinite()].float()
        ties = (finite[:-1] + finite[1:]) / 2  # halfway between neighbours: to even
        overflow = torch.tensor([65519.0, 65520.0, 65535.0, 65536.0, 3.3895314e38, 3.4e38])
        for values in (random.view(torch.float32), finite, ties, overflow, -overflow):
            zeros = torch.zeros(1, len(values), dtype=dtype)
            narrowed = torch.ops.llmkern.rms_norm(zeros, None, values, 1.0, 0.0)
            torch.testing.assert_close(narrowed[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)


def int8_weight(n: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n, 1)


def decode(int8: bool) -> tuple[object, ...]:
    """One sequence long enough for several chunks, one short, one empty."""
    cache = torch.randn(2, 3, 3, 1100, 59)
    scales: tuple[Tensor | None, ...] = (None, None)
    if int8:
        cache, scales = (cache * 40).to(torch.int8), tuple(torch.rand(2, 3, 3, 1100) / 40)
    lengths = torch.tensor([1100, 70, 0])
    return torch.randn(3, 9, 2, 59), *cache, lengths, None, *scales, None, 0.2, [-1, -1], 0.0, True


def varlen(queries: tuple[int, ...], keys: tuple[int, ...]) -> tuple[Any, ...]:
    """Packed sequences, of which one has keys for several tasks."""
    q, k = torch.randn(sum(queries), 9, 59), torch.randn(2, sum(keys), 3, 59)
    sums = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys)]
    return q, *k, *sums, None, None, None, True, 0.2, [-1, -1], 0.0, True


def rotated(interleaved: bool) -> tuple[Any, ...]:
    q, k = torch.randn(2, 9, 77, 66), torch.randn(2, 3, 77, 66)
    return q, k, torch.randn(1, 77, 66), torch.randn(1, 77, 66), 66, interleaved


def packed(rows: int, kind: str) -> tuple[object, ...]:
    make = Make(torch.float32, "cpu", 0)
    weight = random_packed(make, kind, 577, 768)
    groups = [weight.tensors.get(name) for name in ("zero", "offset", "super_scale", "super_offset")]
    call = (make.randn(rows, 768), weight.codes, weight.scale, *groups, None, make.randn(rows, 577))
    return *call, weight.code, weight.n, "none", "a8"


def in_order(op: str, name: str) -> tuple:
    """The arguments of a case, by position."""
    call = next(case for case in cases(op) if str(case) == name).make()
    return tuple(call[argument.name] for argument in getattr(torch.ops.llmkern, op).default._schema.arguments)


# Large enough to be shared among threads, and odd, so that their shares differ.
SHARED = {
    "rms_norm": lambda: (torch.randn(301, 577), torch.randn(577), None, 1e-6, 0.0),
    "layer_norm": lambda: (torch.randn(301, 577), torch.randn(577), torch.randn(577), 1e-6),
    "add_rms_norm": lambda: (*torch.randn(2, 301, 577), torch.randn(577), None, 1e-6, 0.0),
    "add_layer_norm": lambda: (*torch.randn(2, 301, 577), torch.randn(577), None, 1e-6),
    "rms_norm_quant": lambda: (torch.randn(301, 577), torch.randn(577), None, 1e-6, 0.0),
    "add_rms_norm_quant": lambda: (*torch.randn(2, 301, 577), torch.randn(577), None, 1e-6, 0.0),
    "layer_norm_quant": lambda: (torch.randn(301, 577), torch.randn(577), torch.randn(577), 1e-5),
    "add_layer_norm_quant": lambda: (*torch.randn(2, 301, 577), torch.randn(577), None, 1e-5),
    "attention": lambda: (*torch.randn(3, 2, 6, 131, 59), None, None, None, True, 0.2, [-1, -1], 0.0, True),
    "attention_decode": lambda: decode(int8=False),
    "attention_decode-int8": lambda: decode(int8=True),
    "attention_varlen": lambda: varlen((131, 1, 0, 16, 2), (131, 1100, 0, 300, 3)),
    "layers_": lambda: in_order("layers_", "smollm2-float32"),
    "layers_-many": lambda: in_order("layers_", "int8-w8a8-70-tokens-bfloat16"),
    "layers_-encoder": lambda: in_order("layers_", "minilm-float32"),
    "cross_entropy": lambda: (torch.randn(31, 5003), torch.arange(31), None, -100, 0.1, 1e-3, 5.0, "none"),
    "linear_cross_entropy": lambda: in_order("linear_cross_entropy", "70x300-smoothed-float32"),
    "linear_jsd": lambda: in_order("linear_jsd", "70x300-bias-float32"),
    "linear_kl_div": lambda: in_order("linear_kl_div", "70x300-bias-float32"),
    "swiglu": lambda: tuple(torch.randn(2, 301, 577)),
    "swiglu_quant": lambda: tuple(torch.randn(2, 301, 577)),
    "gelu-none": lambda: (torch.randn(301 * 577), "none"),
    "gelu-tanh": lambda: (torch.randn(301, 577), "tanh"),
    "rope-half": lambda: rotated(interleaved=False),
    "rope-interleaved": lambda: rotated(interleaved=True),
    "quantize_int8": lambda: (torch.randn(301, 577),),
    "linear": lambda: (torch.randn(3, 577), torch.randn(577, 577), torch.randn(577), "none"),
    "linear-many": lambda: (torch.randn(33, 577), torch.randn(577, 577), torch.randn(577), "none"),
    "int8_matmul": lambda: (
        torch.randint(-128, 128, (33, 577), dtype=torch.int8),
        int8_weight(577, 577)[0],
        *[None] * 4,
        "none",
        torch.int32,
    ),
    "linear-many-rows": lambda: (torch.randn(2100, 33), torch.randn(70, 33), None, "none"),
    "int8_linear-w8a16": lambda: (torch.randn(5, 577), *int8_weight(577, 577), None, "none", "w8a16"),
    "int8_linear-w8a8": lambda: (torch.randn(5, 577), *int8_weight(577, 577), None, "none", "w8a8"),
    "quantized_linear": lambda: packed(5, "q4_k"),
    "quantized_linear-many": lambda: packed(33, "q6_k"),
    "quantized_linear-many-rows": lambda: packed(900, "q8_0"),
}


def test_every_native_op_is_tested_on_threads() -> None:
    assert {name.split("-")[0] for name in SHARED} == {param.values[0].op for param in NATIVE_CASES}


@built
@pytest.mark.parametrize("name", SHARED)
def test_the_number_of_threads_changes_no_bit(name) -> None:
    call, operator = SHARED[name](), getattr(torch.ops.llmkern, name.split("-")[0])
    before = torch.get_num_threads()
    for isa in here():
        with on(isa):
            try:
                results = []
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    results.append(operator(*call))
            finally:
                torch.set_num_threads(before)
            assert_same_bits(*results)


@built
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (2, 0, 1, 3), (2, 1, 0, 3), (3, 0, 1, 2)])
def test_any_order_of_the_leading_dimensions(order) -> None:
    """The operator itself takes any strides; the last order has no contiguous rows, which the dispatcher refuses."""
    x = torch.randn(3, 4, 5, 24).permute(order)
    weight = torch.randn(x.shape[-1])
    out = torch.ops.llmkern.rms_norm(x, weight, None, 1e-6, 0.0)
    assert torch.equal(out, torch.ops.llmkern.rms_norm(x.contiguous(), weight, None, 1e-6, 0.0))
    assert out.is_contiguous()


@built
@pytest.mark.parametrize(
    ("op", "call", "reason"),
    [
        ("layer_norm", {"x": torch.zeros(32, 1024).T}, "x's last dimension has stride 1024; only 1 is taken"),
        (
            "add_layer_norm",
            {"x": torch.zeros(32, 1024), "residual": torch.zeros(1024, 32).T},
            "residual's last dimension has stride 32; only 1 is taken",
        ),
        ("rms_norm", {"x": torch.zeros(3, 8), "weight": torch.ones(16)[::2]}, "weight is not contiguous"),
        ("rms_norm", {"x": torch.zeros(3, 8), "bias": torch.ones(8).double()}, "bias is torch.float64; float32,"),
        ("rope", {"rotary_dim": 1026}, "1026 dimensions are to be rotated; at most 1024 are taken"),
        ("rope", {"cos": torch.zeros(1, 5, 8).double()}, "cos is torch.float64; float32, bfloat16 and float16"),
        ("rope", {"k": torch.zeros(1, 2, 8, 5).mT}, "k's last dimension has stride 5; only 1 is taken"),
    ],
)
def test_row_kernels_say_what_they_cannot_serve(op, call, reason) -> None:
    if "norm" in op:
        call = {"weight": None, "bias": None, "eps": 1e-6} | call
    if op == "rms_norm":
        call["weight_offset"] = 0.0
    if op == "rope":
        head, angles = torch.zeros(1, 2, 5, 8), torch.zeros(1, 5, 8)
        call = dict(q=head, k=head, cos=angles, sin=angles, rotary_dim=8, interleaved=False) | call
    assert dispatch.implementation(op, "cpu").why_not(**call).startswith(reason)


@built
def test_float64_is_the_reference() -> None:
    x = torch.randn(3, 24, dtype=torch.float64)
    expected = dispatch.implementation("rms_norm", "reference").fn(
        x=x, weight=None, bias=None, eps=1e-6, weight_offset=0.0
    )
    assert torch.equal(torch.ops.llmkern.rms_norm(x, None, None, 1e-6, 0.0), expected)


@built
def test_the_operators_check_what_they_would_read() -> None:
    with pytest.raises(RuntimeError, match=r"weight must be contiguous with shape \[24\]"):
        torch.ops.llmkern.rms_norm(torch.randn(3, 24), torch.randn(23), None, 1e-6, 0.0)
    w, scale = int8_weight(5, 24)
    x = torch.randn(3, 24)
    for message, call in (
        ("w_q has K = 24, x's last dimension is 23", (x[:, 1:], w, scale, None)),
        ("w_scale must be contiguous with 5 elements", (x, w, scale[:4], None)),
        ("bias must be contiguous with 5 elements", (x, w, scale, torch.zeros(6))),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.llmkern.int8_linear(*call, "none", "w8a8")


@built
def test_the_library_needs_neither_python_nor_a_new_system(tool) -> None:
    symbols = tool("objdump", "-T", str(_native.path()))
    assert not re.search(r"\bPy[A-Z_]\w*", symbols)
    for name, most in (("GLIBC", (2, 34)), ("GLIBCXX", (3, 4, 29))):
        found = [tuple(map(int, v.split("."))) for v in re.findall(rf"\b{name}_([\d.]+)", symbols)]
        assert found
        assert max(found) <= most


@built
def test_code_for_one_instruction_set_is_not_shared(tool) -> None:
    """An inline function that an AVX-512 object exports might be the copy that every CPU runs."""
    objects = sorted((ROOT / "build" / "native" / "cpu").rglob("*.o"))
    if not objects:
        pytest.skip("the library was not built here")
    for path in objects:
        isa = path.suffixes[-2].removeprefix(".")
        if isa == "cpp":  # compiled once, for every processor
            continue
        for line in tool("nm", "--defined-only", "-C", str(path)).splitlines():
            _, kind, name = line.split(maxsplit=2)
            assert kind not in "WVu", f"{path.name} exports {name}"
            if kind.isupper() and isa != "portable":
                assert name.startswith(f"llmkern::{isa}::"), f"{path.name} exports {name}"


def test_without_the_library_everything_falls_back_and_says_why() -> None:
    out = python(
        "import llmkern, torch; from llmkern import dispatch; from llmkern.info import info\n"
        "x = torch.randn(2, 8); llmkern.ops.rms_norm(x); torch.ops.llmkern.rms_norm(x, None, None, 1e-6, 0.0)\n"
        "call = dict(x=x, weight=None, bias=None, eps=1e-6, weight_offset=0.0)\n"
        "print(dispatch.select('rms_norm', call).backend.name); print(info().backends['cpu']['missing'])",
        LLMKERN_LIBRARY="/nonexistent/lib.so",
    )
    assert out.splitlines() == [
        "torch",
        "the native library was not loaded: LLMKERN_LIBRARY=/nonexistent/lib.so is not a file",
    ]


def test_a_file_that_is_no_library_is_a_reason_not_an_error(tmp_path: Path, monkeypatch) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    monkeypatch.setattr(settings, "library", str(broken))
    library, reason = _native._load()
    assert library is None
    assert reason.startswith(f"the native library {broken} was not loaded: ")


@built
def test_an_instruction_set_that_the_cpu_lacks_is_a_reason(monkeypatch) -> None:
    monkeypatch.setattr(settings, "cpu_isa", "avx1024")
    library, reason = _native._load()
    assert library is None
    assert "LLMKERN_CPU_ISA='avx1024': expected portable, avx2, avx2_vnni, avx512, " in reason
