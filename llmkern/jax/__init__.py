"""Pallas kernels for TPUs: the ops of `llmkern.ops` as jitted functions of JAX arrays, for Flax and plain JAX.

Names, parameters, shapes and conventions are those of `llmkern.ops`; arrays are float32 or bfloat16 where those take
any floating dtype.  There are no gradients: asking for one is an error.

    from llmkern.jax import attention, rms_norm
    y = rms_norm(x, weight)                       # on a TPU
    with llmkern.jax.interpreted():               # anywhere, slowly: in Pallas's interpreter
        y = rms_norm(x, weight)
    with llmkern.jax.assume("v5e"):               # lower for a chip that is not here
        jax.export.export(jax.jit(rms_norm), platforms=["tpu"])(x, weight)

The kernels are compiled for v5e, executed by the interpreter; no TPU has run them.  JAX is imported when the first
function is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from llmkern.jax._chips import CHIPS, Chip, assume, interpreted

if TYPE_CHECKING:
    from llmkern.jax._activation import gelu, swiglu, swiglu_quant
    from llmkern.jax._attention import attention
    from llmkern.jax._attention_decode import attention_decode
    from llmkern.jax._linear import int8_linear, int8_matmul, linear
    from llmkern.jax._norm import (
        add_layer_norm,
        add_layer_norm_quant,
        add_rms_norm,
        add_rms_norm_quant,
        layer_norm,
        layer_norm_quant,
        rms_norm,
        rms_norm_quant,
    )
    from llmkern.jax._packed_linear import quantized_linear
    from llmkern.jax._quantize import quantize_int8
    from llmkern.jax._rope import rope

__all__ = [
    "CHIPS",
    "Chip",
    "add_layer_norm",
    "add_layer_norm_quant",
    "add_rms_norm",
    "add_rms_norm_quant",
    "assume",
    "attention",
    "attention_decode",
    "gelu",
    "int8_linear",
    "int8_matmul",
    "interpreted",
    "layer_norm",
    "layer_norm_quant",
    "linear",
    "quantize_int8",
    "quantized_linear",
    "rms_norm",
    "rms_norm_quant",
    "rope",
    "swiglu",
    "swiglu_quant",
]

_FAMILIES = {
    "activation": ("gelu", "swiglu", "swiglu_quant"),
    "attention": ("attention",),
    "attention_decode": ("attention_decode",),
    "linear": ("int8_linear", "int8_matmul", "linear"),
    "norm": (
        "rms_norm",
        "layer_norm",
        "add_rms_norm",
        "add_layer_norm",
        "rms_norm_quant",
        "layer_norm_quant",
        "add_rms_norm_quant",
        "add_layer_norm_quant",
    ),
    "packed_linear": ("quantized_linear",),
    "quantize": ("quantize_int8",),
    "rope": ("rope",),
}
_MODULES = {name: f"{__name__}._{family}" for family, names in _FAMILIES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec("jax") is None:
        message = "llmkern.jax needs JAX, which is not installed; pip install jax (on a TPU VM: 'jax[tpu]')"
        raise ModuleNotFoundError(message, name="jax")
    return getattr(importlib.import_module(_MODULES[name]), name)
