"""Distillation.  What speeds up a training loop of one's own is `llmkern.optimize_`, and `llmkern.ops` the losses."""

from __future__ import annotations

from llmkern.training.distillation import Distillation, distill

__all__ = ["Distillation", "distill"]
