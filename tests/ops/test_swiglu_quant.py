from __future__ import annotations

import math

import pytest
import torch

from llmkern import dispatch, ops


def test_values_computed_by_hand() -> None:
    """silu of log 3 is ¾·log 3, and of -log 3 -¼·log 3: the products are (3, -2)·log 3, and 127·2/3 is 84.7."""
    gate = torch.tensor([[math.log(3), -math.log(3)], [0.0, 0.0]])
    q, scale = ops.swiglu_quant(gate, torch.tensor([[4.0, 8.0], [1.0, 2.0]]))
    assert q.tolist() == [[127, -85], [0, 0]]
    torch.testing.assert_close(scale, torch.tensor([[3 * math.log(3) / 127], [0.0]]))


def test_codes_come_from_the_product_in_fp32() -> None:
    """A product rounded to bf16 first gives other codes."""
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 4, 512, generator=generator).bfloat16()
    in_fp32, scale = ops.quantize_int8(ops.swiglu(gate.float(), up.float()))
    rounded, _ = ops.quantize_int8(ops.swiglu(gate, up))
    assert not torch.equal(in_fp32, rounded)
    q, s = ops.swiglu_quant(gate, up)
    assert torch.equal(q, in_fp32)
    torch.testing.assert_close(s, scale)


def test_no_gradient_is_said_not_cut() -> None:
    gate = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(dispatch.Refused, match="swiglu_quant has no gradient: detach its inputs"):
        ops.swiglu_quant(gate, gate)


def test_bad_input() -> None:
    gate = torch.randn(2, 6)
    with pytest.raises(TypeError, match=r"swiglu_quant: up is torch\.bfloat16, expected torch\.float32"):
        ops.swiglu_quant(gate, gate.bfloat16())
    with pytest.raises(ValueError, match=r"swiglu_quant: up has shape \[6\], expected \[2, 6\]"):
        ops.swiglu_quant(gate, gate[0])
    with pytest.raises(ValueError, match=r"swiglu_quant: gate has no dimensions, expected \[\.\.\., hidden\]"):
        ops.swiglu_quant(gate[0, 0], gate[0, 0])
