"""A linear layer with its activation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.checks import (
    check_choice,
    check_floating,
    check_has_hidden,
    check_same_device,
    check_same_dtype,
    check_shape,
    given,
    row_count,
)
from llmkern.dispatch import dispatch
from llmkern.library import define
from llmkern.ops.int8_linear import activation_backward
from llmkern.ops.int8_matmul import ACTIVATIONS

__all__ = ["linear"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none") -> Tensor:
    """`activation(x · weightᵀ + bias)` in x's dtype, accumulated in fp32 at least.

    x: [..., K], fp32, bf16, fp16 or fp64, any strides.  weight: [N, K] and bias: [N], in x's dtype.
    activation: "none", "gelu" (exact), "gelu_tanh", "silu" or "relu".
    Returns [..., N], contiguous; any size may be 0.  Differentiable in x, weight and bias.
    A row's bits depend on the rows beside it only by whether they are few, on the CPU not even so under
    LLMKERN_BATCH_INVARIANT=1; PyTorch's operator promises nothing.
    Raises TypeError for other dtypes, ValueError for other shapes, devices or values.
    """
    return dispatch("linear", _check, x=x, weight=weight, bias=bias, activation=activation)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    check_floating("linear", x=x, weight=weight, **given(bias=bias))
    check_has_hidden("linear", "x", x)
    check_same_dtype("linear", "x", x, weight=weight, bias=bias)
    if weight.dim() != 2:
        raise ValueError(f"linear: weight has {weight.dim()} dimensions, expected [N, K]")
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"linear: weight has K = {k}, expected {x.shape[-1]} (the last dimension of x)")
    check_shape("linear", "bias", bias, (n,), "one value per row of weight")
    check_choice("linear", "activation", activation, ACTIVATIONS)
    check_same_device("linear", "x", x, weight=weight, bias=bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    if ctx.activation != "none":
        z = dispatch("linear", x=x, weight=weight, bias=bias, activation="none")
        dy = activation_backward(dy, z, ctx.activation)
    rows = dy.reshape(row_count(x), weight.shape[0])
    dx = (rows @ weight).view(x.shape)
    dweight = rows.mT @ x.reshape(rows.shape[0], weight.shape[1])
    return dx, dweight, None if bias is None else rows.sum(0), None


define(
    "linear(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
