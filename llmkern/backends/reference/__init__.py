"""The definition of each op in plain torch, any dtype and device.  Run in float64 it judges every other backend."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.dispatch import register

REFERENCE = register("reference", priority=0, kernels=False)


def accumulate(x: Tensor) -> Tensor:
    """`x` in the dtype that reductions run in: fp32 for fp32 and below, fp64 for fp64."""
    return x if x.dtype == torch.float64 else x.float()
