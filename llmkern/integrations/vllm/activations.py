"""Gated activations, in place of vLLM's own classes."""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.activation import SiluAndMul

from llmkern import ops

__all__ = ["SwiGLU", "register"]


class SwiGLU(SiluAndMul):
    """`silu(x[..., :d]) * x[..., d:]`, where custom ops are on; vLLM's own formula for compilers where they are off."""

    def forward_cpu(self, x: Tensor) -> Tensor:
        return ops.swiglu(*x.chunk(2, dim=-1))


def register() -> None:
    """Have vLLM make a SwiGLU wherever a model has a SiluAndMul."""
    if SiluAndMul.__name__ not in op_registry_oot:
        SiluAndMul.register_oot(SwiGLU, name=SiluAndMul.__name__)
