"""Peak memory of what runs between `reset_peak` and `peak`: of the GPU, or of this process where there is none."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

from llmkern.memory import give_back

__all__ = ["peak", "reset_peak"]

_PROC = Path("/proc/self")


def reset_peak(device: torch.device) -> None:
    """Begin anew, so that the peak of loading a model is not taken for that of using it."""
    give_back()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        (_PROC / "clear_refs").write_text("5")  # Linux: VmHWM := VmRSS


def peak(device: torch.device) -> int:
    """Bytes: allocated on the GPU, or resident in this process (where the system cannot begin anew, since it began)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in (_PROC / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
