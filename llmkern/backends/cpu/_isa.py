"""Features of the instruction set in use on which a choice of kernel depends."""

from __future__ import annotations

from llmkern import _native
from llmkern._compile import constant_result

__all__ = ["bf16_by_vectors", "multiplies_bf16"]


@constant_result
def multiplies_bf16() -> bool:
    """Return True if bfloat16 is multiplied by instructions of its own (AVX512-BF16, AMX), not widened to float32."""
    return _native.cpu_isa() in ("avx512_bf16", "amx")


@constant_result
def bf16_by_vectors() -> bool:
    """Return True if those are AVX512-BF16's vectors, not AMX's tiles."""
    return _native.cpu_isa() == "avx512_bf16"
