from __future__ import annotations

import math

import pytest
import torch

from llmkern import ops


def test_values_computed_by_hand() -> None:
    gate = torch.tensor([0.0, math.log(3), -math.log(3)], dtype=torch.float64)  # sigmoid ½, ¾, ¼
    up = torch.tensor([5.0, 4.0, 8.0], dtype=torch.float64)
    torch.testing.assert_close(ops.swiglu(gate, up), torch.tensor([0.0, 3.0, -2.0]).double() * math.log(3))


def test_it_is_the_gate_that_goes_through_silu() -> None:
    gate, up = torch.randn(2, 6), torch.randn(2, 6)
    torch.testing.assert_close(ops.swiglu(gate, up), torch.nn.functional.silu(gate) * up)


def test_bad_input() -> None:
    gate = torch.randn(2, 6)
    with pytest.raises(TypeError, match=r"swiglu: up is torch\.bfloat16, expected torch\.float32 \(the dtype of gate"):
        ops.swiglu(gate, gate.bfloat16())
    with pytest.raises(TypeError, match=r"swiglu: gate is torch\.int64, expected float32"):
        ops.swiglu(gate.long(), gate)
    with pytest.raises(ValueError, match=r"up has shape \[6\], expected \[2, 6\] \(the shape of gate\)"):
        ops.swiglu(gate, gate[0])
    with pytest.raises(ValueError, match=r"up is on meta, expected cpu \(the device of gate\)"):
        ops.swiglu(gate, gate.to("meta"))
