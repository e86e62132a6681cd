from __future__ import annotations

import pytest
import torch

from llmkern import ops


def test_values_computed_by_hand() -> None:
    """Mean square 12.5 without eps, 16 with eps 3.5."""
    x = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    torch.testing.assert_close(ops.rms_norm(x, eps=0.0), x / 12.5**0.5)
    torch.testing.assert_close(ops.rms_norm(x, eps=3.5), x / 4)
    weight, bias = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.0])
    expected = torch.tensor([[0.75 * 2.0 + 0.5, -1.0 * -1.0]], dtype=torch.float64)
    torch.testing.assert_close(ops.rms_norm(x, weight, eps=3.5, weight_offset=1.0, bias=bias), expected)


def test_offset_is_ignored_without_a_weight() -> None:
    x = torch.randn(3, 8)
    torch.testing.assert_close(ops.rms_norm(x, weight_offset=1.0), ops.rms_norm(x), rtol=0, atol=0)


def test_offset_is_added_in_fp32() -> None:
    """1 + 3·2⁻⁹ is no bf16 number: rounding it first gives neighbours of some right results."""
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.full((64,), 3 * 2.0**-9, dtype=torch.bfloat16)
    exact = ops.rms_norm(x.double(), weight.double(), eps=0.0, weight_offset=1.0).bfloat16()
    rounded_first = ops.rms_norm(x.double(), (weight + 1).double(), eps=0.0).bfloat16()
    assert rounded_first.tolist() != exact.tolist()
    assert ops.rms_norm(x, weight, eps=0.0, weight_offset=1.0).tolist() == exact.tolist()


def test_bad_input() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(TypeError, match=r"rms_norm: weight is torch\.int32, expected float32"):
        ops.rms_norm(x, torch.ones(8, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"x has no dimensions, expected \[..., hidden\]"):
        ops.rms_norm(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"weight_offset is inf, expected a finite number"):
        ops.rms_norm(x, torch.ones(8), weight_offset=float("inf"))
    with pytest.raises(ValueError, match=r"eps is -1e-06, expected a finite number that is not negative"):
        ops.rms_norm(x, eps=-1e-6)
