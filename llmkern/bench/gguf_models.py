"""A GGUF file that all contenders are measured on: made by llama.cpp, kept in the cache folder."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from llmkern.bench.peer import Unsupported, need
from llmkern.config import settings

__all__ = ["TYPES", "file_of"]

TYPES = {
    "F32": "LLAMA_FTYPE_ALL_F32",
    "BF16": "LLAMA_FTYPE_MOSTLY_BF16",
    "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
    "Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
    "Q4_K_M": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
}
"""llama.cpp's names for what a file's matrices mostly are."""

_missing = need("llama_cpp", "llama-cpp-python")


def file_of(spec: Any, kind: str) -> Path:
    """Return the model's GGUF file of this type, converted by llama.cpp from the weights that there are.

    Raises `Unsupported` for models of which there is no GGUF file, and where llama.cpp is not installed.
    """
    if (reason := _missing()) is not None:
        raise Unsupported(reason)
    import llama_cpp

    source = _source(spec)
    target = Path(settings.cache).expanduser() / f"{source.stem}-llama.cpp-{kind}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_suffix(f".{os.getpid()}")
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = getattr(llama_cpp, TYPES[kind]), True
        options.nthread = spec.threads
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(scratch).encode(), ctypes.byref(options))
        if status != 0:
            raise RuntimeError(f"llama_model_quantize to {kind} ended with status {status}")
        scratch.replace(target)
    return target


def _source(spec: Any) -> Path:
    from llmkern.testing.real_models import smollm2_file

    if spec.model == "demo:smollm2":
        return smollm2_file()
    if spec.model == "demo:smollm2-offgrid":
        return _off_grid()
    if spec.model is not None and spec.model.endswith(".gguf"):
        return Path(spec.model)
    raise Unsupported("llama.cpp reads GGUF files: give MODEL as one")


def _off_grid() -> Path:
    """The off-grid demo model as a GGUF file in fp32."""
    from llmkern.testing.gguf_write import write_like
    from llmkern.testing.off_grid import rescale_
    from llmkern.testing.real_models import load_smollm2, smollm2_file

    target = Path(settings.cache).expanduser() / "SmolLM2-135M-Instruct-offgrid.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_like(target, rescale_(load_smollm2()[0]), smollm2_file())
    return target
