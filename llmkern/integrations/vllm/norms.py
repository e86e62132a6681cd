"""Providers of vLLM's IR ops: normalisations.

The functions have the signatures of the ops' definitions, annotations included: vLLM compares them.
"""

from __future__ import annotations

import torch
from vllm import ir

from llmkern import ops
from llmkern.checks import FLOATING

__all__ = ["register"]

PROVIDER = "llmkern"


def _takes_rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return variance_size is None and x.dtype in FLOATING


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    return ops.rms_norm(x, weight, epsilon)


def _takes_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    return variance_size is None and x.dtype in FLOATING and x_residual.dtype == x.dtype


def fused_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.add_rms_norm(x, x_residual, weight, epsilon)


def register() -> None:
    """Register the provider `llmkern`."""
    for op, takes, implementation in (
        (ir.ops.rms_norm, _takes_rms_norm, rms_norm),
        (ir.ops.fused_add_rms_norm, _takes_add_rms_norm, fused_add_rms_norm),
    ):
        if PROVIDER not in op.impls:
            op.register_impl(PROVIDER, supports_args=takes)(implementation)
