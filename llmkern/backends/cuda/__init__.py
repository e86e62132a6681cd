"""CUDA C++ kernels (csrc/cuda) for Ampere and newer."""

from __future__ import annotations

import torch

from llmkern import _native
from llmkern.dispatch import register


def _missing() -> str | None:
    reason = _native.part_missing("CUDA")
    if reason is None and not torch.cuda.is_available():
        reason = "torch finds no CUDA GPU here"
    return reason


CUDA = register("cuda", priority=400, devices=("cuda",), missing=_missing)
