"""vLLM: a plugin with which its engine and its server compute with llmkern's kernels.

===========  =================================================================================================
file         what it holds
===========  =================================================================================================
linear       quantization methods `llmkern_int8` and others: floating-point checkpoints, quantized as they load
checkpoint   quantization method `llmkern`: checkpoints that `save_pretrained` wrote of a quantized model
embedding    embeddings and heads of both
weights      a layer's weight in few bits, and products with it
norms        providers of vLLM's IR ops
activations  SiluAndMul
===========  =================================================================================================

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`).  What it registers is used where
the engine's options ask for it: `engine_options`.  Attention stays vLLM's own: on its paged cache, called layer by
layer from Python, ours was the slower one.  Importing this package imports nothing of vLLM.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

from llmkern.quantization.schemes import NAMES

__all__ = ["METHODS", "VERSION", "engine_options", "register"]

VERSION = "0.32"
"""The release of vLLM whose interfaces the plugin was made for: they change from one release to the next."""

METHODS = {f"llmkern_{name.replace('-', '_')}": name for name in NAMES}
"""Quantization methods of vLLM, and the schemes of `llmkern.quantize_` that they stand for."""

_PARTS = ("linear", "checkpoint", "norms", "activations")
_OURS_FIRST = ["llmkern", "native"]


def register() -> None:
    """Register llmkern's quantization methods, norms and activations with vLLM; a second call changes nothing.

    Another release of vLLM than `VERSION` gets a warning instead, and stays as it is.
    """
    version = str(import_module("vllm").__version__)
    if version != VERSION and not version.startswith(f"{VERSION}."):
        logging.getLogger(__name__).warning(
            "llmkern's plugin is made for vLLM %s and stays out of vLLM %s, which works without it", VERSION, version
        )
        return
    for part in _PARTS:
        import_module(f"{__name__}.{part}").register()


def engine_options(quantization: str | None = None) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` with which it computes with llmkern's kernels.

    quantization: a scheme of `llmkern.quantize_` by name, for a floating-point checkpoint; "checkpoint" for one that
        `save_pretrained` wrote of a quantized model; None leaves the weights as they are.
    Raises ValueError for another name.
    """
    methods = {**{name: method for method, name in METHODS.items()}, "checkpoint": "llmkern"}
    if quantization is not None and quantization not in methods:
        expected = " or ".join(map(repr, methods))
        raise ValueError(f"engine_options: quantization is {quantization!r}, expected {expected}")
    return {
        **({} if quantization is None else {"quantization": methods[quantization]}),
        "kernel_config": {"ir_op_priority": {"rms_norm": _OURS_FIRST, "fused_add_rms_norm": _OURS_FIRST}},
        "compilation_config": {"custom_ops": ["all"]},
    }
