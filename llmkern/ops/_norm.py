"""Checks of the normalisations, and the fake of their gradients."""

from __future__ import annotations

from torch import Tensor

from llmkern.checks import (
    check_finite,
    check_floating,
    check_non_negative,
    check_parameter,
    check_same_device,
    check_same_dtype,
    check_shape,
)


def check_norm(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float = 0.0
) -> None:
    """Check that x is floating [..., hidden], the parameters fit it, eps is not negative, the offset finite."""
    check_floating(op, x=x)
    check_parameter(op, "x", x, weight=weight, bias=bias)
    check_non_negative(op, "eps", eps)
    check_finite(op, "weight_offset", weight_offset)


def check_add_norm(
    op: str,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
) -> None:
    """Check as `check_norm`, and that the residual has x's dtype, shape and device."""
    check_norm(op, x, weight, bias, eps, weight_offset)
    check_floating(op, residual=residual)
    check_same_dtype(op, "x", x, residual=residual)
    check_shape(op, "residual", residual, x.shape, "the shape of x")
    check_same_device(op, "x", x, residual=residual)


def fake_gradients(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty (dx, dweight, dbias); the gradient of a None parameter has 0 elements."""
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if weight is None else weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )
