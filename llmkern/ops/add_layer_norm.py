"""The residual sum and the layer normalisation of it, in one pass over memory."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from llmkern.dispatch import dispatch
from llmkern.library import define
from llmkern.ops._norm import check_add_norm

__all__ = ["add_layer_norm"]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`(layer_norm(x + residual), x + residual)`.

    x, residual: [..., hidden], the same shape and dtype (fp32, bf16, fp16 or fp64), any strides.
    weight, bias: [hidden], any floating dtype; None for 1 and 0.
    Returns (norm, sum), contiguous, of x's shape and dtype.  The sum is rounded to that dtype, and the norm is of
    the rounded sum: what a model that adds first and normalises afterwards computes.  Differentiable.
    Raises TypeError for other or different dtypes, ValueError for other shapes, devices, or a negative eps.
    """
    return dispatch("add_layer_norm", _check, x=x, residual=residual, weight=weight, bias=bias, eps=eps)


_check = partial(check_add_norm, "add_layer_norm")


def _fake(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight, bias)


def _backward(ctx: Any, dout: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
    total, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = dispatch("layer_norm_backward", dy=dout, x=total, weight=weight, bias=bias, eps=ctx.eps)
    dx = dx + dtotal
    return dx, dx, dweight if weight is not None else None, dbias if bias is not None else None, None


define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) -> (Tensor out, Tensor total)",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
