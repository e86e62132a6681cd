"""Options that several commands share."""

from __future__ import annotations

import re

import torch

from llmkern.quantization.schemes import NAMES

__all__ = ["SCHEMES", "check_scheme", "device_named", "dtype_named", "least_and_most"]

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
    "fp64": torch.float64,
}


def dtype_named(name: str) -> torch.dtype:
    """The dtype of an option `--dtype`."""
    if name not in _DTYPES:
        raise ValueError(f"--dtype is {name!r}, expected float32, bfloat16, float16 or float64")
    return _DTYPES[name]


SCHEMES = ", ".join(NAMES)
"""What `--quantize` takes, for its help."""


def check_scheme(scheme: str | None) -> None:
    """The scheme of an option `--quantize` is known."""
    if scheme is not None and scheme not in NAMES:
        raise ValueError(f"--quantize is {scheme!r}, expected {SCHEMES}")


def device_named(name: str) -> torch.device:
    """The device of an option `--device`, which is there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}, expected cpu, cuda or auto")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device is {name!r}, and PyTorch finds no CUDA device; there is cpu")
    return torch.device(name)


def least_and_most(option: str, value: str) -> tuple[int, int]:
    """The numbers of an option like `2` or `1..4`."""
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", value)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most <= 1024:
        raise ValueError(f"{option} is {value!r}, expected a number of at least 1, or two as in 1..4")
    return least, most
