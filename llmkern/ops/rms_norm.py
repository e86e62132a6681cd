"""Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from llmkern.dispatch import dispatch
from llmkern.library import define
from llmkern.ops._norm import check_norm, fake_gradients

__all__ = ["rms_norm"]


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """`x / sqrt(mean(x², -1) + eps) * (weight + weight_offset) + bias`, reduced in fp32.

    x: [..., hidden], fp32, bf16, fp16 or fp64, any strides.
    weight, bias: [hidden], any floating dtype; None for 1 and 0.
    weight_offset: 1.0 for Gemma, whose checkpoints store weight − 1; ignored without a weight.
    Returns a contiguous tensor of x's shape and dtype.  Differentiable in x, weight and bias.
    Raises TypeError for other dtypes, ValueError for other shapes, devices, or a negative eps.
    """
    return dispatch("rms_norm", _check, x=x, weight=weight, bias=bias, eps=eps, weight_offset=weight_offset)


_check = partial(check_norm, "rms_norm")


def _fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, eps, weight_offset = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.eps, ctx.weight_offset = eps, weight_offset


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = dispatch(
        "rms_norm_backward", dy=dy, x=x, weight=weight, bias=bias, eps=ctx.eps, weight_offset=ctx.weight_offset
    )
    return dx, dweight if weight is not None else None, dbias if bias is not None else None, None, None


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(x, weight, bias)


define(
    "rms_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, float weight_offset) -> Tensor",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
# Gradients of arguments that are None come back with 0 elements.
define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, float eps, float weight_offset)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    fake=_fake_backward,
)
