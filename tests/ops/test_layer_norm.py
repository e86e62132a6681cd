from __future__ import annotations

import pytest
import torch

from llmkern import ops


def test_values_computed_by_hand() -> None:
    """Mean 2, variance 5: the biased one, over 4 elements."""
    x = torch.tensor([[-1.0, 1.0, 3.0, 5.0]], dtype=torch.float64)
    expected = torch.tensor([[-3.0, -1.0, 1.0, 3.0]], dtype=torch.float64) / 5**0.5
    torch.testing.assert_close(ops.layer_norm(x, eps=0.0), expected)
    weight, bias = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    torch.testing.assert_close(ops.layer_norm(x, weight, bias, eps=0.0), expected * weight.double() + bias.double())


def test_eps_is_added_to_the_variance() -> None:
    x = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(ops.layer_norm(x, eps=3.0), x / 2)


def test_constant_rows_give_the_bias() -> None:
    bias = torch.randn(16)
    out = ops.layer_norm(torch.full((3, 16), 7.25), torch.randn(16), bias)
    torch.testing.assert_close(out, bias.expand(3, 16), rtol=0, atol=0)


def test_defaults_are_those_of_pytorch() -> None:
    x = torch.randn(3, 20)
    torch.testing.assert_close(ops.layer_norm(x), torch.nn.functional.layer_norm(x, (20,)))


def test_bad_input() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(TypeError, match=r"layer_norm: x is torch\.int64, expected float32"):
        ops.layer_norm(torch.ones(2, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"layer_norm: bias is torch\.int8, expected float32"):
        ops.layer_norm(x, bias=torch.ones(8, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"weight has shape \[4\], expected \[8\] \(the last dimension of x\)"):
        ops.layer_norm(x, torch.ones(4))
    with pytest.raises(ValueError, match=r"bias is on meta, expected cpu"):
        ops.layer_norm(x, bias=torch.ones(8, device="meta"))
    with pytest.raises(ValueError, match=r"eps is -1.0, expected a finite number that is not negative"):
        ops.layer_norm(x, eps=-1.0)
    with pytest.raises(ValueError, match=r"eps is nan"):
        ops.layer_norm(x, eps=float("nan"))
