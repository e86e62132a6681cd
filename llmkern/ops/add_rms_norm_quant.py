"""The residual sum, its root-mean-square normalisation, and per-token int8 quantization, in one pass over memory."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from llmkern.dispatch import dispatch
from llmkern.library import define
from llmkern.ops._norm import check_add_norm
from llmkern.ops.quantize_int8 import fake_codes

__all__ = ["add_rms_norm_quant"]


def add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(*rms_norm_quant(x + residual), x + residual)`.

    x, residual: [..., hidden], the same shape and dtype (fp32, bf16, fp16 or fp64), any strides.
    weight, bias, weight_offset: as in rms_norm.
    Returns (q int8 [..., hidden], scale fp32 [..., 1], sum), contiguous.  The sum is rounded to x's dtype, the norm
    is of the rounded sum as in add_rms_norm, and is quantized from fp32 as in rms_norm_quant.  No gradient.
    Raises TypeError for other or different dtypes, ValueError for other shapes, devices, or a negative eps.
    """
    return dispatch(
        "add_rms_norm_quant",
        _check,
        x=x,
        residual=residual,
        weight=weight,
        bias=bias,
        eps=eps,
        weight_offset=weight_offset,
    )


_check = partial(check_add_norm, "add_rms_norm_quant")


def _fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    return *fake_codes(x), x.new_empty(x.shape)


define(
    "add_rms_norm_quant(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float weight_offset)"
    " -> (Tensor q, Tensor scale, Tensor total)",
    fake=_fake,
)
