"""Every environment variable that llmkern reads, on one page.

They are read once, when `llmkern` is imported; call :func:`reload` after changing `os.environ`
in a running process.  Unset and empty mean the same.  A value that is not accepted is a ValueError at the first call.

=======================  ==========  =====================================================================
variable                 default     meaning
=======================  ==========  =====================================================================
LLMKERN_BACKEND          (none)      force one backend for every call, as ``use_backend(name)`` does; a call
                                     that it cannot serve raises
LLMKERN_STRICT           0           1: raise where no kernel backend (cuda, triton, cpu) can serve a call,
                                     instead of falling back to PyTorch
LLMKERN_BATCH_INVARIANT  0           1: a row's bits never depend on the rows beside it; backends that do not promise
                                     that refuse, and linear layers of many rows take longer
LLMKERN_KEEP_PACKED      0           1: transformers' ``from_pretrained`` keeps the codes of GGUF files, GPTQ, AWQ and
                                     compressed-tensors checkpoints, as with ``llmkern.PackedConfig()``
LLMKERN_DEBUG            0           1: the command line shows the traceback of every error, not only its line
LLMKERN_API_KEY          (none)      the key that ``llmkern serve`` asks for, as its option --api-key
LLMKERN_LIBRARY          (none)      path of the native library to load instead of the one in the package
LLMKERN_CACHE            ~/.cache/   where the checkpoint that SmolLM2 is dequantised to is kept, and the tables
                         llmkern     of ``llmkern tune``
LLMKERN_CPU_ISA          (best)      instruction set of the native CPU kernels: portable, avx2, avx2_vnni, avx512,
                                     avx512_vnni, avx512_bf16 or amx, on Arm portable, neon_dotprod or neon_i8mm;
                                     read when the library is loaded
LLMKERN_BUILD            1           while building: 0 = no native library
LLMKERN_CUDA             auto        while building: 0 = no CUDA part, 1 = CUDA part or an error, nvcc = CUDA part
                                     where nvcc is found, auto = where an NVIDIA GPU is found too
LLMKERN_CUDA_ARCHS       80;90a      while building: compute capabilities to compile for
LLMKERN_SANITIZE         0           while building: 1 = with AddressSanitizer and UBSan, as ``make sanitize`` does
=======================  ==========  =====================================================================
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Settings", "after_reload", "reload", "settings"]


@dataclass
class Settings:
    """The values in force.  Fields may be assigned; they are read at every dispatched call.

    But for batch_invariant, which the native library holds as well: `llmkern._native.set_batch_invariant`.
    """

    backend: str | None = None
    strict: bool = False
    batch_invariant: bool = False
    keep_packed: bool = False
    debug: bool = False
    library: str | None = None
    cpu_isa: str | None = None
    cache: str = "~/.cache/llmkern"


class _NotAccepted(Settings):
    """Settings while the environment has a value that is not accepted: every call that is dispatched raises.

    Importing llmkern does not, so that the command line, which imports it, has a line for the error.
    """

    def __getattribute__(self, name: str) -> Any:
        if name in ("backend", "strict"):
            _flags()
        return super().__getattribute__(name)


def _flag(name: str) -> bool:
    value = os.environ.get(name, "") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{name} is {value!r}, expected 0 or 1")
    return value == "1"


_FLAGS = ("strict", "debug", "batch_invariant", "keep_packed")


def _flags() -> dict[str, bool]:
    return {name: _flag(f"LLMKERN_{name.upper()}") for name in _FLAGS}


settings = Settings()


def reload() -> Settings:
    """Read the environment again; returns the one `settings` object, updated in place.

    Raises ValueError for a value that is not accepted, and has changed nothing then.
    """
    flags = _flags()
    settings.__class__ = Settings
    settings.backend = os.environ.get("LLMKERN_BACKEND") or None
    for name, value in flags.items():
        setattr(settings, name, value)
    settings.library = os.environ.get("LLMKERN_LIBRARY") or None
    settings.cpu_isa = os.environ.get("LLMKERN_CPU_ISA") or None
    settings.cache = os.environ.get("LLMKERN_CACHE") or Settings.cache
    for apply in after_reload:
        apply()
    return settings


after_reload: list[Callable[[], None]] = []
"""Called after the settings were read again, by modules that keep a copy of one."""

try:
    reload()
except ValueError:
    settings.__class__ = _NotAccepted
