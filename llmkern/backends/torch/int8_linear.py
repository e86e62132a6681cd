from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.torch import TORCH
from llmkern.backends.torch.int8_matmul import int8_matmul
from llmkern.backends.torch.int8_matmul import refuse as refuse_product
from llmkern.backends.torch.quantize_int8 import quantize_int8
from llmkern.checks import row_count
from llmkern.dispatch import implements
from llmkern.ops.int8_linear import FEW_ROWS, straight_through
from llmkern.ops.int8_matmul import activate

DEQUANTIZE_AT_ONCE = 2**19
"""Weights dequantized at a time on the CPU: 2 MiB of fp32 stay in cache, where a whole weight would go to memory
and back, through pages that the allocator has just returned (4096² in fp32, one row: 33 ms whole)."""


def _refuse(x: Tensor, w_q: Tensor, scheme: str, **_: object) -> str | None:
    if x.shape[-1] == 0:
        return "the largest of no elements has no value"
    return refuse_product(a_q=x, w_q=w_q) if scheme == "w8a8" else None


@implements(
    "int8_linear", TORCH, dtypes=(torch.float32, torch.bfloat16, torch.float16), has_backward=True, refuse=_refuse
)
def int8_linear(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, activation: str, scheme: str) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _StraightThrough.apply(x, w_q, w_scale, bias, activation, scheme)
    return _forward(x, w_q, w_scale, bias, activation, scheme)


def _forward(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, activation: str, scheme: str) -> Tensor:
    if scheme == "w8a8":
        codes, scale = quantize_int8(x)
        return int8_matmul(codes, w_q, scale, w_scale, bias, None, activation, x.dtype)
    y = _product(x, w_q, w_scale)
    if bias is not None:
        y = y + bias
    return activate(y, activation).to(x.dtype).contiguous()


def _product(x: Tensor, w_q: Tensor, w_scale: Tensor) -> Tensor:
    """x · (w_q * w_scale)ᵀ in fp32, from a product that may have been rounded to x's dtype once."""
    rows = x.reshape(row_count(x), x.shape[-1])
    if _packed_kernel_serves(rows, w_q):
        # Its scales would be rounded to x's dtype, an error common to a whole channel; ones are exact.
        y = torch._weight_int8pack_mm(rows, w_q, rows.new_ones(w_q.shape[0])) * w_scale.squeeze(-1)
        return y.view(*x.shape[:-1], -1)
    step = max(1, DEQUANTIZE_AT_ONCE // w_q.shape[1]) if x.device.type == "cpu" else w_q.shape[0]
    parts = [
        F.linear(x, (codes * scale).to(x.dtype)).float()
        for codes, scale in zip(w_q.split(step), w_scale.split(step), strict=True)
    ]
    return torch.cat(parts, -1)


def _packed_kernel_serves(rows: Tensor, w_q: Tensor) -> bool:
    """torch._weight_int8pack_mm checks nothing: with K = 7 or K = 333 it reads beyond its inputs and may crash.

    In fp16 its sums of codes could pass 65504, which scales of 1 would let happen; in fp32 it is slower than
    dequantizing.
    """
    n, k = w_q.shape
    fits = n > 0 and n % 16 == 0 and k % 32 == 0 and w_q.is_contiguous() and rows.is_contiguous()
    return rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and 0 < rows.shape[0] <= FEW_ROWS and fits


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_q: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        activation: str,
        scheme: str,
    ) -> Tensor:
        ctx.save_for_backward(x, w_q, w_scale, bias)
        ctx.activation, ctx.scheme = activation, scheme
        return _forward(x, w_q, w_scale, bias, activation, scheme)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w_q, w_scale, bias = ctx.saved_tensors
        dx, dbias = straight_through(dy, x, w_q, w_scale, bias, ctx.activation, ctx.scheme)
        return dx, None, None, dbias, None, None
