"""Large linear layers: few rows by the native kernel, everything else as before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import llmkern
from llmkern import _native
from llmkern.nn import Int8Linear
from llmkern.swap.rules.linear import MIN_BYTES

pytestmark = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))
COLUMNS = 256
ROWS = MIN_BYTES // 4 // COLUMNS


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(COLUMNS, COLUMNS), nn.Linear(COLUMNS, 2 * ROWS)).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_are_native_and_many_pytorchs(dtype) -> None:
    module = model(dtype)
    few, many = torch.randn(1, 3, COLUMNS, dtype=dtype), torch.randn(1, 30, COLUMNS, dtype=dtype)
    with torch.no_grad():
        before = [module(few), module(many)]
        report = llmkern.report(llmkern.optimize_(module)).swap
        assert [(row.path, row.kind, row.backend) for row in report.swapped] == [("1", "linear", "cpu")]
        torch.testing.assert_close(module(few), before[0], rtol=2e-2, atol=1e-5 if dtype == torch.float32 else 1e-2)
        assert torch.equal(module(many), before[1])
        calls = [(call.op, call.backend) for x in (few, many) for call in llmkern.explain(module, x).rows]
    assert calls == [("linear", "cpu"), ("linear", "torch")]
    llmkern.restore_(module)
    assert type(module[1]) is nn.Linear


def test_small_layers_and_the_switch_leave_alone() -> None:
    module = model()
    assert not llmkern.report(llmkern.optimize_(module, linear=False, on_unsupported="ignore")).swap.swapped
    assert type(module[1]) is nn.Linear
    assert type(module[0]) is nn.Linear


def test_autocast_and_other_dtypes_are_pytorchs() -> None:
    module = model()
    x = torch.randn(2, COLUMNS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = module(x)
        llmkern.optimize_(module)
        assert torch.equal(module(x), before)
    with pytest.raises(RuntimeError, match="dtype"):
        module[1](x.double())


def test_gradients_are_pytorchs() -> None:
    module = model()
    x = torch.randn(2, COLUMNS, requires_grad=True)
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    llmkern.optimize_(module)
    (got,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(got, expected)


def test_a_swapped_layer_is_quantized_as_any_other() -> None:
    module = model()
    llmkern.optimize_(module)
    llmkern.quantize_(module)
    assert all(isinstance(child, Int8Linear) for child in module)
    llmkern.restore_(module)
    assert all(isinstance(child, Int8Linear) for child in module)
