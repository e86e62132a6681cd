"""Training: a model's own loss without its logits in memory; distillation."""

from __future__ import annotations

from llmkern.training.distillation import Distillation, distill
from llmkern.training.loss import fuse_loss_, unfuse_loss_

__all__ = ["Distillation", "distill", "fuse_loss_", "unfuse_loss_"]
