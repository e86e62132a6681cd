"""The gate of a SwiGLU feed-forward layer and per-token int8 quantization of its result, in one pass over memory."""

from __future__ import annotations

from torch import Tensor

from llmkern.checks import check_has_hidden
from llmkern.dispatch import dispatch
from llmkern.library import define
from llmkern.ops.quantize_int8 import fake_codes
from llmkern.ops.swiglu import check_gated

__all__ = ["swiglu_quant"]


def swiglu_quant(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_int8(swiglu(gate, up))`, with the product kept in fp32 in between.

    gate, up: [..., hidden], the same shape and dtype (fp32, bf16, fp16 or fp64), any strides, as in swiglu.
    Returns (q int8 [..., hidden], scale fp32 [..., 1]), contiguous; zero rows, NaN and infinity as in quantize_int8.
    Codes whose value lies next to a rounding tie may differ by one between backends.  No gradient.
    Raises TypeError for other or different dtypes, ValueError for different shapes or devices, or no dimensions.
    """
    return dispatch("swiglu_quant", _check, gate=gate, up=up)


def _check(gate: Tensor, up: Tensor) -> None:
    check_gated("swiglu_quant", gate, up)
    check_has_hidden("swiglu_quant", "gate", gate)


def _fake(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return fake_codes(gate)


define("swiglu_quant(Tensor gate, Tensor up) -> (Tensor q, Tensor scale)", fake=_fake)
