"""llmkern: hand-written kernels swapped into the transformer models people already run."""

from llmkern import backends as backends
from llmkern import ops
from llmkern.dispatch import implements, register, use_backend
from llmkern.explain import explain
from llmkern.info import Info, info
from llmkern.swap import SwapReport, SwapRow, optimize_, patched, restore_
from llmkern.verify import Accuracy, verify

__all__ = [
    "Accuracy",
    "Info",
    "SwapReport",
    "SwapRow",
    "explain",
    "implements",
    "info",
    "ops",
    "optimize_",
    "patched",
    "register",
    "restore_",
    "use_backend",
    "verify",
]
