"""What the instruction set in use has, as far as a choice depends on it."""

from __future__ import annotations

from llmkern import _native
from llmkern._compile import constant_result

__all__ = ["bf16_by_vectors", "multiplies_bf16"]


@constant_result
def multiplies_bf16() -> bool:
    """Whether bfloat16 is multiplied by instructions of its own (AVX512-BF16, AMX), not widened to float32."""
    return _native.cpu_isa() in ("avx512_bf16", "amx")


@constant_result
def bf16_by_vectors() -> bool:
    """Whether those are AVX512-BF16's vectors, not AMX's tiles."""
    return _native.cpu_isa() == "avx512_bf16"
