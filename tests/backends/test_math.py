"""csrc/cpu/math.h on every instruction set, against float64: each function's error in units in the last place."""

from __future__ import annotations

import ctypes
import math
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import setuptools
import torch

from llmkern import _native

ROOT = Path(__file__).parents[2]
ISAS = ("portable", "avx2", "avx512")
SOURCE = """
#include "math.h"
#define FUNCTION(f)                                                                         \\
  extern "C" void apply_##f(const float* x, float* y, long n) {                             \\
    using namespace llmkern::LLMKERN_ISA;                                                   \\
    for (long i = 0; i < n; i += kLanes) store(y + i, llmkern::LLMKERN_ISA::f(load(x + i))); \\
  }
FUNCTION(exp)
FUNCTION(exp_or_0)
FUNCTION(tanh)
FUNCTION(silu)
FUNCTION(gelu)
FUNCTION(gelu_tanh)
FUNCTION(quick_gelu)
"""


@pytest.fixture(scope="module", params=ISAS)
def functions(request, tmp_path_factory) -> ctypes.CDLL:
    """The functions of math.h, compiled as setup.py compiles kernels for one instruction set."""
    before = _native.cpu_isa()
    if before is None:
        pytest.skip(str(_native.reason()))
    try:
        _native.set_cpu_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    _native.set_cpu_isa(before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        setup = runpy.run_path(str(ROOT / "setup.py"))
    folder = tmp_path_factory.mktemp(request.param)
    source, library = folder / "functions.cpp", folder / "functions.so"
    source.write_text(SOURCE)
    flags = [*setup["COMMON"], *setup["HOST"], *setup["KERNEL"], *setup["ISAS"][request.param], "-fvisibility=default"]
    flags += [f"-DLLMKERN_ISA={request.param}"]
    flags += [f"-iquote{ROOT / 'csrc' / 'cpu'}", "-shared"]
    subprocess.run([setup["find_compiler"](), *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def apply(function: Callable[..., None], x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_long(x.numel()))
    return y


def ulps(y: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error in units in the last place of the exact value, of subnormal ones too."""
    spacing = numpy.spacing(numpy.abs(exact.numpy()).astype(numpy.float32)).astype(numpy.float64)
    return float(((y.double() - exact).abs() / torch.from_numpy(spacing)).max())


def test_exp(functions: ctypes.CDLL) -> None:
    x = torch.linspace(-103.9, 88.72, 2**20)
    assert ulps(apply(functions.apply_exp, x), x.double().exp()) <= 1.1
    near_zero = torch.linspace(-0.01, 0.01, 2**16)
    assert ulps(apply(functions.apply_exp, near_zero), near_zero.double().exp()) <= 1.1
    inf, nan = float("inf"), float("nan")
    special = torch.tensor([0.0, -0.0, -104.0, -1e9, -3.4e38, -inf, 88.73, 1e9, inf, nan, -nan, *[1e-40] * 5])
    expected = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, inf, inf, inf, nan, nan, *[1.0] * 5])
    torch.testing.assert_close(apply(functions.apply_exp, special), expected, rtol=0, atol=0, equal_nan=True)


def test_exp_or_0(functions: ctypes.CDLL) -> None:
    x = torch.linspace(-87, 0, 2**20)
    assert ulps(apply(functions.apply_exp_or_0, x), x.double().exp()) <= 1.1
    below = torch.tensor([-87.01, -88.0, -103.0, -104.0, -1e9, -3.4e38, -float("inf"), *[-87.5] * 9])
    assert torch.equal(apply(functions.apply_exp_or_0, below), torch.zeros(16))
    assert apply(functions.apply_exp_or_0, torch.full((16,), float("nan"))).isnan().all()


def test_tanh(functions: ctypes.CDLL) -> None:
    for x in (torch.linspace(-10, 10, 2**20), torch.linspace(-1e-3, 1e-3, 2**16)):
        assert ulps(apply(functions.apply_tanh, x), x.double().tanh()) <= 1.5
    inf, nan = float("inf"), float("nan")
    special = torch.tensor([0.0, 20.0, -20.0, 1e30, -1e30, inf, -inf, nan, *[1e-40] * 8])
    expected = torch.tensor([0.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, nan, *[1e-40] * 8])
    torch.testing.assert_close(apply(functions.apply_tanh, special), expected, rtol=0, atol=0, equal_nan=True)


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + (-x).exp())


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.special.erfc(x * -math.sqrt(0.5)) / 2


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize(
    ("exact", "low", "high", "most"),
    [
        (silu, -80.0, 80.0, 3),
        (gelu, 0.0, 30.0, 4),
        (gelu_tanh, -1.0, 30.0, 3),
        (gelu_tanh, -6.0, 0.0, 70),
        (quick_gelu, -1.0, 40.0, 3),
        (quick_gelu, -50.0, 0.0, 85),
    ],
)
def test_activations(functions: ctypes.CDLL, exact, low: float, high: float, most: float) -> None:
    x = torch.linspace(low, high, 2**20)
    assert ulps(apply(getattr(functions, f"apply_{exact.__name__}"), x), exact(x.double())) <= most


def test_gelu_of_negative_values(functions: ctypes.CDLL) -> None:
    x = torch.linspace(-20, 0, 2**20)
    assert float((apply(functions.apply_gelu, x).double() - gelu(x.double())).abs().max()) <= 1e-7


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "quick_gelu"])
def test_activations_of_special_values(functions: ctypes.CDLL, name: str) -> None:
    """As the limits say, but for -infinity, where PyTorch's functions have 0 times infinity too."""
    inf, nan = float("inf"), float("nan")
    x = torch.tensor(
        [nan, -nan, inf, -inf, 0.0, -0.0, 3.4e38, -3.4e38, 1e20, -1e20, 1e-40, -1e-40, *[200.0, -200.0] * 2]
    )
    expected = torch.tensor([nan, nan, inf, nan, 0, 0, 3.4e38, 0, 1e20, 0, 5e-41, -5e-41, *[200.0, 0.0] * 2])
    torch.testing.assert_close(apply(getattr(functions, f"apply_{name}"), x), expected, rtol=0, atol=0, equal_nan=True)
