"""Triton kernels: NVIDIA GPUs from sm_80 on, AMD GPUs from the same source, and Triton's interpreter on the CPU.

`<op>.py` declares an op and launches; `_kernels/` holds the device code, which is imported by the first launch, so
that neither importing llmkern nor a machine without Triton ever imports Triton.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re

import torch

from llmkern.dispatch import register

OLDEST = (3, 6)
FIRST_WITH_NUMPY_2_4 = (3, 7)
"""Older interpreters index with arrays of one element, which NumPy 2.4 refuses."""


def installed() -> bool:
    """Return True if any version of Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Return True if Triton runs kernels in its interpreter, as it decides itself when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def version(package: str) -> tuple[int, ...]:
    """(major, minor) of an installed package."""
    return tuple(int(number) for number in re.findall(r"\d+", importlib.metadata.version(package))[:2])


def _missing() -> str | None:
    if not installed():
        return "Triton is not installed; pip install triton"
    found = version("triton")
    if found < OLDEST:
        return f"Triton {importlib.metadata.version('triton')} is too old; {OLDEST[0]}.{OLDEST[1]} or newer is needed"
    if interpreted():
        if found < FIRST_WITH_NUMPY_2_4 and version("numpy") >= (2, 4):
            return f"Triton {found[0]}.{found[1]} cannot interpret with NumPy 2.4; pip install 'numpy<2.4'"
        return None
    if not torch.cuda.is_available():
        return "torch finds no GPU here, and Triton's interpreter runs only where TRITON_INTERPRET=1 is set"
    return None


TRITON = register("triton", priority=300, devices=("cuda", "cpu"), missing=_missing)
