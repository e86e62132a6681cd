"""The residual sum, its layer normalisation, and per-token int8 quantization, in one pass over memory."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from llmkern.dispatch import dispatch
from llmkern.library import define
from llmkern.ops._norm import check_add_norm
from llmkern.ops.quantize_int8 import fake_codes

__all__ = ["add_layer_norm_quant"]


def add_layer_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """`(*layer_norm_quant(x + residual), x + residual)`.

    x, residual: [..., hidden], the same shape and dtype (fp32, bf16, fp16 or fp64), any strides.
    weight, bias: as in layer_norm.
    Returns (q int8 [..., hidden], scale fp32 [..., 1], sum), contiguous.  The sum is rounded to x's dtype, the norm
    is of the rounded sum as in add_layer_norm, and is quantized from fp32 as in layer_norm_quant.  No gradient.
    Raises TypeError for other or different dtypes, ValueError for other shapes, devices, or a negative eps.
    """
    return dispatch("add_layer_norm_quant", _check, x=x, residual=residual, weight=weight, bias=bias, eps=eps)


_check = partial(check_add_norm, "add_layer_norm_quant")


def _fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return *fake_codes(x), x.new_empty(x.shape)


define(
    "add_layer_norm_quant(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor q, Tensor scale, Tensor total)",
    fake=_fake,
)
