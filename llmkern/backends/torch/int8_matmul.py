from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern._compile import constant_result
from llmkern.backends.reference.int8_matmul import epilogue
from llmkern.backends.torch import TORCH
from llmkern.checks import row_count
from llmkern.dispatch import implements

CUDA_MIN_ROWS = 17
"""torch._int_mm on CUDA: more than 16 rows, N and K multiples of 8.  On the CPU it takes any shape."""


def refuse(a_q: Tensor, w_q: Tensor, **_: object) -> str | None:
    """Why torch._int_mm cannot multiply these."""
    n, k = w_q.shape
    if a_q.device.type == "cuda":
        if n % 8 or k % 8 or not n or not k:
            return f"torch._int_mm on CUDA needs N and K to be positive multiples of 8, not {n} and {k}"
        return None
    if a_q.device.type != "cpu":
        return f"torch._int_mm runs on CPU and CUDA, not on {a_q.device.type}"
    return _saturates()


@constant_result
def _saturates() -> str | None:
    return _probe()


@functools.cache
def _probe() -> str | None:
    """Instruction sets before VNNI add pairs of products in 16 bits; extreme codes show whether they are used."""
    rows = torch.tensor([-128, 127], dtype=torch.int8).repeat_interleave(32).view(2, 32).repeat(16, 2)
    exact = rows.double() @ rows.double().T
    if torch.equal(torch._int_mm(rows, rows.T).double(), exact):
        return None
    return "torch._int_mm saturates on this CPU (it has no VNNI), so its sums are not exact"


@implements("int8_matmul", TORCH, refuse=refuse)
def int8_matmul(
    a_q: Tensor,
    w_q: Tensor,
    a_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    rows = a_q.reshape(row_count(a_q), a_q.shape[-1])
    missing = CUDA_MIN_ROWS - rows.shape[0] if a_q.device.type == "cuda" else 0
    if missing > 0:
        rows = F.pad(rows, (0, 0, 0, missing))
    accumulators = torch._int_mm(rows, w_q.t())
    if missing > 0:
        accumulators = accumulators[:-missing]
    accumulators = accumulators.view(*a_q.shape[:-1], w_q.shape[0])
    return epilogue(accumulators, a_scale, w_scale, bias, residual, activation, out_dtype)
