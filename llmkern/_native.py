"""The native library: found and loaded once, when this module is first imported, and why it is missing where it is.

Nothing here raises: without the library, llmkern runs on PyTorch's operators, and `reason` says why.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

from llmkern._signatures import signatures
from llmkern.config import after_reload, settings
from llmkern.registry import forget

__all__ = [
    "CPU_ISAS",
    "build_info",
    "cpu_isa",
    "cuda_unusable",
    "kernels",
    "part_missing",
    "path",
    "reason",
    "set_batch_invariant",
    "set_cpu_isa",
]

_PACKAGE = Path(__file__).parent
_HOW = "build it with `pip install --no-build-isolation --no-deps -e .` in the source tree"
CPU_ISAS = (
    ("portable", "neon_dotprod", "neon_i8mm")
    if platform.machine() in ("aarch64", "arm64")
    else ("portable", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx")
)
"""The instruction sets of the CPU kernels on this kind of machine, best last."""
_ISAS = f"expected {', '.join(CPU_ISAS[:-1])} or {CPU_ISAS[-1]}, as far as this CPU has it"


def path() -> Path:
    """Return the path of the native library: LLMKERN_LIBRARY, or the package's own."""
    return Path(settings.library) if settings.library else _PACKAGE / "_ops.abi3.so"


def _build_reasons() -> dict[str, str | None]:
    """Read what setup.py left: why each part was not built (None if it was), and the signatures of the ops then; empty
    if it never ran."""
    try:
        reasons = json.loads((_PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return reasons if isinstance(reasons, dict) else {}


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """Load the library; return it, or why it could not be loaded."""
    where = path()
    if not where.is_file():
        if settings.library:
            return None, f"the native library was not loaded: LLMKERN_LIBRARY={where} is not a file"
        why = _build_reasons().get("library") or "the build did not run"
        return None, f"the native library was not built: {why}; {_HOW}"
    built_for = None if settings.library else _build_reasons().get("signatures")
    if built_for is not None and built_for != (signatures(_PACKAGE) or built_for):
        why = f"the native library {where} is stale: it was built for other signatures of the ops; {_HOW}"
        warnings.warn(why, RuntimeWarning, stacklevel=2)
        return None, why
    try:
        torch.ops.load_library(os.fspath(where))
        library = ctypes.CDLL(os.fspath(where))
        library.llmkern_cpu_isa.restype = ctypes.c_char_p
        library.llmkern_set_batch_invariant(settings.batch_invariant)
        if settings.cpu_isa is not None and library.llmkern_set_cpu_isa(settings.cpu_isa.encode()) != 0:
            return None, f"the native library is not used: LLMKERN_CPU_ISA={settings.cpu_isa!r}: {_ISAS}"
    except (OSError, AttributeError, RuntimeError) as error:
        return None, f"the native library {where} was not loaded: {' '.join(str(error).split())}"
    return library, None


_library, _reason = _load()


def reason() -> str | None:
    """Return why the native library is not loaded, or None."""
    return _reason


def part_missing(part: str) -> str | None:
    """Return why the loaded library has no kernels for `part` ("CPU" or "CUDA"), or None."""
    if _reason is not None:
        return _reason
    registered = torch._C._dispatch_get_registrations_for_dispatch_key(part)
    if any(name.startswith("llmkern::") for name in registered):
        return None
    why = None if settings.library else _build_reasons().get(part.lower())
    return f"the native library was built without its {part} part" + (f": {why}" if why else "")


def cuda_unusable() -> str | None:
    """Return why the driver does not take the library's kernels on torch's current GPU, or None."""
    if _library is None:
        return _reason
    probe = _library.llmkern_cuda_error
    probe.restype = ctypes.c_char_p
    error = probe(torch.cuda.current_device()).decode()
    if not error:
        return None
    built = build_info().get("cuda_archs") or "unknown architectures"
    return f"the CUDA kernels, built for {built}, cannot run here: {error}; a newer driver, or a build here, would help"


def cpu_isa() -> str | None:
    """The instruction set that the CPU kernels use; None without the library."""
    return None if _library is None else _library.llmkern_cpu_isa().decode()


def set_cpu_isa(name: str) -> None:
    """Have the CPU kernels use instruction set `name`, one of `CPU_ISAS`.

    Raises ValueError where there is no such set or this CPU cannot run it, RuntimeError without the library.
    """
    if _library is None:
        raise RuntimeError(_reason)
    if _library.llmkern_set_cpu_isa(name.encode()) != 0:
        raise ValueError(f"set_cpu_isa: {name!r}: {_ISAS}")
    forget()


def set_batch_invariant(value: bool) -> None:
    """Set LLMKERN_BATCH_INVARIANT for this process: True keeps a row's bits independent of the rows beside it."""
    settings.batch_invariant = value
    _apply_settings()


def _apply_settings() -> None:
    if _library is not None:
        _library.llmkern_set_batch_invariant(settings.batch_invariant)
    forget()


after_reload.append(_apply_settings)


def build_info() -> dict[str, Any]:
    """Return compilers, versions, flags and parts of the library's build; or, under "built", why they are unknown."""
    try:
        return dict(importlib.import_module("llmkern._C").build_info())
    except ImportError as error:
        return {"built": f"unknown, llmkern._C is missing: {_build_reasons().get('_C') or error}"}


def kernels() -> list[dict[str, Any]]:
    """The CUDA kernels and what each takes of an SM; empty without llmkern._C."""
    try:
        return list(importlib.import_module("llmkern._C").kernels())
    except ImportError:
        return []
