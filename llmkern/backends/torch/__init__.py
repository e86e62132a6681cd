"""PyTorch's own best operator for each op: the fallback at run time, and the baseline of the accuracy rule."""

from __future__ import annotations

from llmkern.dispatch import register

TORCH = register("torch", priority=100, kernels=False)
