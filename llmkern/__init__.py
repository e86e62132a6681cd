"""llmkern: hand-written kernels swapped into the transformer models people already run."""

from typing import TYPE_CHECKING, Any

from llmkern import backends as backends
from llmkern import nn, ops
from llmkern.dispatch import implements, register, use_backend
from llmkern.explain import explain
from llmkern.info import Info, info
from llmkern.integrations.transformers.by_name import register_when_imported as _register_when_imported
from llmkern.quantization import Int4, Int5, Int6, Int8, PruneReport, QuantReport, dequantize_, load, prune_, quantize_
from llmkern.report import Report, is_optimized, report
from llmkern.swap import SwapReport, SwapRow, optimize_, patched, restore_
from llmkern.training import distill
from llmkern.verify import Accuracy, verify

if TYPE_CHECKING:
    from llmkern.integrations.transformers.cache import KVCache
    from llmkern.quantization.transformers_quantizer import Int8Config, PackedConfig, QuantConfig

    __version__: str

__all__ = [
    "Accuracy",
    "Info",
    "Int4",
    "Int5",
    "Int6",
    "Int8",
    "Int8Config",
    "KVCache",
    "PackedConfig",
    "PruneReport",
    "QuantConfig",
    "QuantReport",
    "Report",
    "SwapReport",
    "SwapRow",
    "dequantize_",
    "distill",
    "explain",
    "implements",
    "info",
    "is_optimized",
    "load",
    "nn",
    "ops",
    "optimize_",
    "patched",
    "prune_",
    "quantize_",
    "register",
    "report",
    "restore_",
    "use_backend",
    "verify",
]


_register_when_imported()


def __getattr__(name: str) -> Any:
    if name == "KVCache":  # importing it takes transformers, which llmkern itself needs only where there is a model
        from llmkern.integrations.transformers import kv_cache

        return kv_cache()
    if name in ("Int8Config", "PackedConfig", "QuantConfig"):
        from llmkern.integrations.transformers import quantization_config

        return quantization_config(name)
    if name == "__version__":
        from llmkern.info import package_version

        return package_version("llmkern") or "0+source"  # not installed, but run from where its source is
    raise AttributeError(f"module 'llmkern' has no attribute {name!r}")
