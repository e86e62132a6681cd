"""The header of a result: what it was measured on, and by what."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from llmkern.backends.tpu import DEVICE as TPU_DEVICE
from llmkern.info import info

__all__ = ["device_name", "environment", "memory_of", "slug"]

_ROOT = Path(__file__).resolve().parents[2]
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "MKL_NUM_THREADS")


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, the library and its arches, git commit, threads, and clocks where readable."""
    found = info().to_dict()
    del found["library"]["path"]  # where it is on this machine means nothing on another
    return {
        "device": device_name(device),
        "device_type": device.type,
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git_commit": _commit(),
        "threads": torch.get_num_threads(),
        "thread_variables": {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
        "load_average": round(os.getloadavg()[0], 2),
        "driver": _nvidia("driver_version") if device.type == "cuda" else None,
        "clocks": _clocks(device),
        "interrupted": False,
        **found,
    }


def device_name(device: torch.device) -> str:
    """The GPU's, the TPU's or the CPU's name."""
    if device.type == TPU_DEVICE:
        import jax

        return str(jax.devices()[0].device_kind)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(info().hardware["cpu"])


def memory_of(device: torch.device) -> int:
    """Bytes of memory of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    with contextlib.suppress(OSError), open("/proc/meminfo") as lines:
        return int(next(lines).split()[1]) * 1024
    return 2**33


def slug(name: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _commit() -> str | None:
    """The source tree's commit, with + where files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "llmkern", "csrc")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _nvidia(query: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.splitlines()[0].strip()
    return None


def _clocks(device: torch.device) -> str | None:
    if device.type == "cuda":
        return _nvidia("clocks.sm,clocks.mem,clocks.max.sm,power.limit")
    with contextlib.suppress(OSError):
        found = re.findall(r"^cpu MHz\s*: (\S+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return ", ".join(f"{float(mhz):.0f} MHz" for mhz in found) or None
    return None
