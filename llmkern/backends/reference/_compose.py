"""Ops that are other ops in a row: the sum before a norm, the codes after an op.  The torch backend composes alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from llmkern.backends.reference import accumulate

__all__ = ["of_the_sum", "quantized"]

Codes = tuple[Tensor, Tensor]


def of_the_sum(norm: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """The outputs of `norm` for x + residual, rounded to their dtype, and that sum."""

    def call(x: Tensor, residual: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
        total = (x + residual).contiguous()
        out = norm(x=total, **arguments)
        return (*out, total) if isinstance(out, tuple) else (out, total)

    return call


def quantized(op: Callable[..., Tensor], quantize_int8: Callable[[Tensor], Codes]) -> Callable[..., Codes]:
    """`op`, whose result stays in fp32 (fp64 for fp64), as codes and scale."""

    def call(**arguments: Any) -> Codes:
        wide = {name: accumulate(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}
        return quantize_int8(op(**wide))

    return call
