"""Gaussian error linear unit (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.checks import check_choice, check_floating
from llmkern.dispatch import dispatch
from llmkern.library import define

__all__ = ["gelu"]


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """`x·Φ(x)` with Φ the normal distribution function, computed in fp32.

    x: any shape and strides, fp32, bf16, fp16 or fp64.
    approximate: "none", or "tanh" for Φ(x) ≈ ½·(1 + tanh(√(2/π)·(x + 0.044715·x³))), as GPT-2 and Gemma use it.
    Returns a contiguous tensor of x's shape and dtype.  Differentiable.
    Raises TypeError for other dtypes, ValueError for another approximation.
    """
    return dispatch("gelu", _check, x=x, approximate=approximate)


def _check(x: Tensor, approximate: str) -> None:
    check_floating("gelu", x=x)
    check_choice("gelu", "approximate", approximate, ("none", "tanh"))


def _fake(x: Tensor, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.approximate = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return dispatch("gelu_backward", dy=dy, x=x, approximate=ctx.approximate), None


def _fake_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


define("gelu(Tensor x, str approximate) -> Tensor", fake=_fake, backward=_backward, setup_context=_setup_context)
define("gelu_backward(Tensor dy, Tensor x, str approximate) -> Tensor", fake=_fake_backward)
