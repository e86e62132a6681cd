"""CUDA C++ kernels (csrc/cuda) for Ampere and newer."""

from __future__ import annotations

import torch

from llmkern import _native
from llmkern.dispatch import register


def _missing() -> str | None:
    if torch.version.hip is not None:  # whose GPUs call themselves cuda devices
        return "this torch is for AMD GPUs, and these kernels are for NVIDIA's"
    if reason := _native.part_missing("CUDA"):
        return reason
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU here"
    return _native.cuda_unusable()


CUDA = register("cuda", priority=400, devices=("cuda",), missing=_missing)
