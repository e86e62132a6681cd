"""llmkern: hand-written kernels swapped into the transformer models people already run."""

from llmkern import backends as backends
from llmkern import nn, ops
from llmkern.dispatch import implements, register, use_backend
from llmkern.explain import explain
from llmkern.info import Info, info
from llmkern.quantization import QuantReport, dequantize_, quantize_
from llmkern.swap import SwapReport, SwapRow, optimize_, patched, restore_
from llmkern.verify import Accuracy, verify

__all__ = [
    "Accuracy",
    "Info",
    "QuantReport",
    "SwapReport",
    "SwapRow",
    "dequantize_",
    "explain",
    "implements",
    "info",
    "nn",
    "ops",
    "optimize_",
    "patched",
    "quantize_",
    "register",
    "restore_",
    "use_backend",
    "verify",
]
