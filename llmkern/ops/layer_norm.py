"""Layer normalisation (Ba, Kiros & Hinton 2016, arXiv:1607.06450)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from llmkern.dispatch import dispatch
from llmkern.library import define
from llmkern.ops._norm import check_norm, fake_gradients

__all__ = ["layer_norm"]


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """`(x - mean(x, -1)) / sqrt(var(x, -1) + eps) * weight + bias`, reduced in fp32; var divides by hidden.

    x: [..., hidden], fp32, bf16, fp16 or fp64, any strides.
    weight, bias: [hidden], any floating dtype; None for 1 and 0.
    Returns a contiguous tensor of x's shape and dtype.  Differentiable in x, weight and bias.
    Raises TypeError for other dtypes, ValueError for other shapes, devices, or a negative eps.
    """
    return dispatch("layer_norm", _check, x=x, weight=weight, bias=bias, eps=eps)


_check = partial(check_norm, "layer_norm")


def _fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, eps = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.eps = eps


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = dispatch("layer_norm_backward", dy=dy, x=x, weight=weight, bias=bias, eps=ctx.eps)
    return dx, dweight if weight is not None else None, dbias if bias is not None else None, None


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(x, weight, bias)


define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
# Gradients of arguments that are None come back with 0 elements.
define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    fake=_fake_backward,
)
