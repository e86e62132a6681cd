from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_strided
from llmkern.dispatch import implements, known
from llmkern.library import native

MAX_HEAD_DIM = 256
MAX_ROWS_BF16 = 32
"""It computes in fp32.  Measured on one core with AMX, µs, native / PyTorch: 12 rows by 300 keys of 64 dimensions and 3
heads 53/138, 48 rows 190/193; 64 rows by 2048 keys of 128 dimensions and 8 heads 22378/14886."""


def refuse_long(**vectors: Tensor) -> str | None:
    """Return which head dimension the attention kernels do not hold, or None."""
    for name, tensor in vectors.items():
        if tensor.shape[3] > MAX_HEAD_DIM:
            return f"{name} has head dimension {tensor.shape[3]}; at most {MAX_HEAD_DIM} is taken"
    return None


def refuse_sinks(sinks: Tensor | None) -> str | None:
    """Return why the attention kernels do not read these sinks, or None."""
    if sinks is not None and sinks.dtype not in DTYPES:
        return f"sinks is {sinks.dtype}; float32, bfloat16 and float16 are taken"
    if sinks is not None and not sinks.is_contiguous():
        return "sinks is not contiguous"
    return None


def refuse_heads(sinks: Tensor | None, **vectors: Tensor) -> str | None:
    """Return why neither attention kernel takes long or strided vectors, or sinks of other dtypes; or None."""
    return refuse_long(**vectors) or refuse_sinks(sinks) or refuse_strided(**vectors)


def _refuse(q: Tensor, k_cache: Tensor, v_cache: Tensor, sinks: Tensor | None, **_: Any) -> str | None:
    return refuse_heads(sinks, q=q, k_cache=k_cache, v_cache=v_cache)


def _slower(
    q: Tensor,
    k_cache: Tensor,
    k_scale: Tensor | None,
    sinks: Tensor | None,
    softcap: float,
    return_lse: bool,
    **_: Any,
) -> str | None:
    rows = q.shape[1] // k_cache.shape[1] * q.shape[2]
    plain = k_scale is None and sinks is None and softcap == 0 and not return_lse
    if plain and q.dtype == torch.bfloat16 and known(rows > MAX_ROWS_BF16):
        return (
            f"{rows} queries share a key head; at most {MAX_ROWS_BF16} are taken in bfloat16: with more, PyTorch "
            "can be faster"
        )
    return None


implements("attention_decode", CPU, dtypes=DTYPES, refuse=_refuse, slower=_slower, rows_alone="always")(
    native("attention_decode")
)
