from __future__ import annotations

import math

import pytest
import torch

from llmkern import ops


def test_values_of_the_normal_distribution() -> None:
    """Φ(1) and Φ(1.96) as printed in any table, to its digits."""
    x = torch.tensor([0.0, 1.0, -1.0, 1.96], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.8413447461, -0.1586552539, 1.96 * 0.9750021049], dtype=torch.float64)
    torch.testing.assert_close(ops.gelu(x), expected, rtol=0, atol=1e-9)


def test_tanh_form_computed_by_hand() -> None:
    t = math.tanh(math.sqrt(2 / math.pi) * (2 + 0.044715 * 8))
    out = ops.gelu(torch.tensor([2.0], dtype=torch.float64), approximate="tanh")
    torch.testing.assert_close(out, torch.tensor([1 + t], dtype=torch.float64))
    assert out.item() != ops.gelu(torch.tensor([2.0], dtype=torch.float64)).item()


def test_a_scalar_tensor_is_taken() -> None:
    assert ops.gelu(torch.tensor(0.0)).shape == ()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"gelu: approximate is 'erf', expected 'none' or 'tanh'"):
        ops.gelu(torch.randn(2), approximate="erf")
    with pytest.raises(TypeError, match=r"gelu: x is torch\.int32, expected float32"):
        ops.gelu(torch.ones(2, dtype=torch.int32))
