from __future__ import annotations

from llmkern.backends.reference._compose import of_the_sum
from llmkern.backends.torch import TORCH
from llmkern.backends.torch.layer_norm import layer_norm
from llmkern.dispatch import implements

implements("add_layer_norm", TORCH, has_backward=True)(of_the_sum(layer_norm))
