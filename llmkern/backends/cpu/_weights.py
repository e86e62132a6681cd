"""Refusals that the linear layers share: forms of weights that their kernels cannot take."""

from __future__ import annotations

from torch import Tensor

from llmkern.backends.cpu._rows import DTYPES


def refuse_weight(name: str, weight: Tensor) -> str | None:
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        return f"the rows of {name} have stride {weight.stride(1)}; only 1 is taken"
    return None


def refuse_vectors(**vectors: Tensor | None) -> str | None:
    """Scales and bias, [n], or [n, 1] in fp32, which the op has checked."""
    for name, vector in vectors.items():
        if vector is not None and not vector.is_contiguous():
            return f"{name} is not contiguous"
        if vector is not None and vector.dtype not in DTYPES:
            return f"{name} is {vector.dtype}; float32, bfloat16 and float16 are taken"
    return None
