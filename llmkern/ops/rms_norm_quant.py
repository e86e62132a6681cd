"""Root-mean-square normalisation and per-token int8 quantization of the result, in one pass over memory."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from llmkern.dispatch import dispatch
from llmkern.library import define
from llmkern.ops._norm import check_norm
from llmkern.ops.quantize_int8 import fake_codes

__all__ = ["rms_norm_quant"]


def rms_norm_quant(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`quantize_int8(rms_norm(x))`, with the norm kept in fp32 in between.

    x, weight, bias, weight_offset: as in rms_norm.
    Returns (q int8 [..., hidden], scale fp32 [..., 1]), contiguous; zero rows, NaN and infinity as in quantize_int8.
    Codes whose value lies next to a rounding tie may differ by one between backends.  No gradient.
    Raises TypeError for other dtypes, ValueError for other shapes, devices, or a negative eps.
    """
    return dispatch("rms_norm_quant", _check, x=x, weight=weight, bias=bias, eps=eps, weight_offset=weight_offset)


_check = partial(check_norm, "rms_norm_quant")


def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    return fake_codes(x)


define(
    "rms_norm_quant(Tensor x, Tensor? weight, Tensor? bias, float eps, float weight_offset)"
    " -> (Tensor q, Tensor scale)",
    fake=_fake,
)
