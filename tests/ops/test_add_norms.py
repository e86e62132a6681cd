"""add_layer_norm, add_rms_norm and their int8 forms, against the ops that they fuse."""

from __future__ import annotations

import pytest
import torch

from llmkern import dispatch, ops

ADD = {f"add_{norm}": norm for norm in ("layer_norm", "rms_norm", "layer_norm_quant", "rms_norm_quant")}
ADD_OPS = pytest.mark.parametrize("op", ADD)


def operands(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return x, residual


@ADD_OPS
def test_it_is_the_norm_of_the_sum_and_the_sum(op: str) -> None:
    x, residual = operands(3, 32)
    *normed, total = getattr(ops, op)(x, residual, torch.full((32,), 0.5))
    assert torch.equal(total, x + residual)
    expected = getattr(ops, ADD[op])(x + residual, torch.full((32,), 0.5))
    torch.testing.assert_close(tuple(normed), expected if isinstance(expected, tuple) else (expected,))


@pytest.mark.parametrize("impl", dispatch.implementations("add_rms_norm"), ids=lambda impl: impl.backend.name)
def test_the_norm_sees_the_rounded_sum(impl: dispatch.Implementation) -> None:
    """256 + 1 is 256 in bf16.  Unrounded, the norm's (1.002, -0.998) times 1024 would leave (2, 2) after the bias."""
    call = {
        "x": torch.tensor([[256.0, -256.0]], dtype=torch.bfloat16),
        "residual": torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16),
        "weight": torch.tensor([1024.0, 1024.0]),
        "bias": torch.tensor([-1024.0, 1024.0]),
        "eps": 0.0,
        "weight_offset": 0.0,
    }
    if reason := impl.why_not(**call):
        pytest.skip(reason)
    out, total = impl.fn(**call)
    assert total.tolist() == [[256.0, -256.0]]
    assert out.abs().max() < 0.01


def test_layer_norm_sees_the_rounded_sum() -> None:
    x = torch.tensor([[256.0, 256.0]], dtype=torch.bfloat16)
    residual = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    out, _ = ops.add_layer_norm(x, residual)
    assert out.tolist() == [[0.0, 0.0]], "257 and 256 would come out as 1 and -1"


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_codes_come_from_the_norm_in_fp32(norm: str) -> None:
    """A norm rounded to bf16 first gives other codes."""
    x, _ = operands(4, 512, dtype=torch.bfloat16)
    in_fp32, scale = ops.quantize_int8(getattr(ops, norm)(x.float()))
    rounded, _ = ops.quantize_int8(getattr(ops, norm)(x))
    assert not torch.equal(in_fp32, rounded)
    q, s = getattr(ops, f"{norm}_quant")(x)
    assert torch.equal(q, in_fp32)
    torch.testing.assert_close(s, scale)


def test_values_computed_by_hand() -> None:
    """(3, 4) has root mean square √12.5; with weight 2 and eps 3.5 it becomes (1.5, 2): scale 2/127, code 95.25."""
    x, residual = torch.tensor([[1.0, 5.0]]), torch.tensor([[2.0, -1.0]])
    q, scale, total = ops.add_rms_norm_quant(x, residual, torch.full((2,), 1.0), 3.5, weight_offset=1.0)
    assert total.tolist() == [[3.0, 4.0]]
    assert q.tolist() == [[95, 127]]
    torch.testing.assert_close(scale, torch.tensor([[2 / 127]]))


def test_a_layer_norm_computed_by_hand() -> None:
    """(3, 6, 9) has mean 6 and variance 6; with eps 3 it is (-1, 0, 1), and (-1, 1, 3) after weight 2 and bias 1."""
    x, residual = torch.tensor([[1.0, 5.0, 9.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    q, scale, total = ops.add_layer_norm_quant(x, residual, torch.full((3,), 2.0), torch.ones(3), 3.0)
    assert total.tolist() == [[3.0, 6.0, 9.0]]
    assert q.tolist() == [[-42, 42, 127]]
    torch.testing.assert_close(scale, torch.tensor([[3 / 127]]))


@pytest.mark.parametrize("op", [f"{add}{norm}_norm_quant" for add in ("", "add_") for norm in ("rms", "layer")])
def test_no_gradient_is_said_not_cut(op: str) -> None:
    x = torch.randn(2, 8, requires_grad=True)
    arguments = (x, x) if op.startswith("add") else (x,)
    with pytest.raises(dispatch.Refused, match=f"{op} has no gradient: detach its inputs"):
        getattr(ops, op)(*arguments)


def test_only_one_of_the_outputs_is_used() -> None:
    x, residual = operands(2, 8)
    x.requires_grad_()
    (of_sum,) = torch.autograd.grad(ops.add_rms_norm(x, residual)[1].sum(), x)
    assert torch.equal(of_sum, torch.ones(2, 8))
    (of_norm,) = torch.autograd.grad(torch.ops.llmkern.add_rms_norm(x, residual, None, None, 1e-6, 0.0)[0].sum(), x)
    total = (x + residual).detach().requires_grad_()
    (expected,) = torch.autograd.grad(ops.rms_norm(total).sum(), total)
    torch.testing.assert_close(of_norm, expected)


@ADD_OPS
def test_bad_input(op: str) -> None:
    fn, x = getattr(ops, op), torch.randn(2, 8)
    with pytest.raises(TypeError, match=rf"{op}: residual is torch\.float16, expected torch\.float32 \(the dtype of x"):
        fn(x, x.half())
    with pytest.raises(ValueError, match=rf"{op}: residual has shape \[8\], expected \[2, 8\] \(the shape of x\)"):
        fn(x, x[0])
    with pytest.raises(ValueError, match=rf"{op}: residual is on meta, expected cpu"):
        fn(x, x.to("meta"))
    with pytest.raises(ValueError, match=rf"{op}: weight has shape \[7\], expected \[8\]"):
        fn(x, x, torch.ones(7))
    with pytest.raises(ValueError, match=rf"{op}: eps is -1, expected a finite number that is not negative"):
        fn(x, x, eps=-1)
