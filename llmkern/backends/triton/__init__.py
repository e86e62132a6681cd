"""Triton kernels."""

from __future__ import annotations

import importlib.util

import torch

from llmkern.dispatch import register


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU here"
    return None


TRITON = register("triton", priority=300, devices=("cuda",), missing=_missing)
