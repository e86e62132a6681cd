"""Layer normalisation and per-token int8 quantization of the result, in one pass over memory."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from llmkern.dispatch import dispatch
from llmkern.library import define
from llmkern.ops._norm import check_norm
from llmkern.ops.quantize_int8 import fake_codes

__all__ = ["layer_norm_quant"]


def layer_norm_quant(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`quantize_int8(layer_norm(x))`, with the norm kept in fp32 in between.

    x, weight, bias: as in layer_norm.
    Returns (q int8 [..., hidden], scale fp32 [..., 1]), contiguous; zero rows, NaN and infinity as in quantize_int8.
    Codes whose value lies next to a rounding tie may differ by one between backends.  No gradient.
    Raises TypeError for other dtypes, ValueError for other shapes, devices, or a negative eps.
    """
    return dispatch("layer_norm_quant", _check, x=x, weight=weight, bias=bias, eps=eps)


_check = partial(check_norm, "layer_norm_quant")


def _fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return fake_codes(x)


define(
    "layer_norm_quant(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor q, Tensor scale)",
    fake=_fake,
)
