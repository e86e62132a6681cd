"""Memory of the GPU, or else of this process: now, and at its peak between `reset_peak` and `peak`."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

from llmkern.memory import give_back

__all__ = ["peak", "reset_peak", "resident"]

_PROC = Path("/proc/self")


def reset_peak(device: torch.device) -> None:
    """Reset the peak, so that loading a model is not counted as using it."""
    give_back()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        (_PROC / "clear_refs").write_text("5")  # Linux: VmHWM := VmRSS


def peak(device: torch.device) -> int:
    """Return the peak bytes allocated on the GPU, or resident in this process (since its start, if no reset works)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (kept := _of_status("VmHWM")) is not None:
        return kept
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def resident(device: torch.device) -> int | None:
    """Return the bytes allocated on the GPU, or resident in this process; None if the system does not say."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _of_status("VmRSS")


def _of_status(name: str) -> int | None:
    """An entry of Linux's /proc/self/status, in bytes."""
    with contextlib.suppress(OSError):
        for line in (_PROC / "status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
