"""Per-token symmetric int8 quantization, as W8A8 inference uses it for activations (LLM.int8(), arXiv:2208.07339)."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.checks import check_floating, check_has_hidden
from llmkern.dispatch import dispatch
from llmkern.library import define

__all__ = ["quantize_int8"]


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes `q` and one scale per row (the last dimension), so that `q * scale` is x to half a step.

    x: [..., hidden], fp32, bf16, fp16 or fp64, any strides; `hidden` and any other size may be 0.
    Returns (q int8 [..., hidden], scale fp32 [..., 1]), contiguous.  No gradient.
    Raises TypeError for other dtypes, ValueError for a tensor without dimensions.

    Every backend gives the same bits.  In fp32 (fp64 for fp64), each operation rounded to nearest even once:
        amax = max|x|;  scale = amax / 127;  inv = 127 / amax;  q = round_half_even(x * inv), within ±127
    - amax < 2⁻¹¹⁸: a zero row, scale 0 and q 0.  From 2⁻¹¹⁸ on, scale and inv are normal numbers and every
      subnormal x rounds to code 0 (x·inv < 2⁻¹²⁶ · 127·2¹¹⁸ < ½), so flushing subnormals to zero changes nothing.
    - NaN in a row: scale NaN and q 0.  Infinity (or an fp64 scale beyond fp32): scale inf and q 0.  Either way
      `q * scale` is NaN: NaN in gives NaN out.
    """
    return dispatch("quantize_int8", _check, x=x)


def _check(x: Tensor) -> None:
    check_floating("quantize_int8", x=x)
    check_has_hidden("quantize_int8", "x", x)


def fake_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate (q, scale) for the rows of `x`."""
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


define("quantize_int8(Tensor x) -> (Tensor q, Tensor scale)", fake=fake_codes)
