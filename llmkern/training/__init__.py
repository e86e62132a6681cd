"""Training: a model's own loss without its logits in memory."""

from __future__ import annotations

from llmkern.training.loss import fuse_loss_, unfuse_loss_

__all__ = ["fuse_loss_", "unfuse_loss_"]
