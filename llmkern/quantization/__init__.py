"""Models of few bits: quantize_, its report, and the way back."""

from llmkern.quantization.checkpoint import load, load_
from llmkern.quantization.dequantize import dequantize_
from llmkern.quantization.pruning import PruneReport, prune_
from llmkern.quantization.quantize import quantize_
from llmkern.quantization.report import QuantReport, QuantRow
from llmkern.quantization.schemes import Int4, Int5, Int6, Int8

__all__ = [
    "Int4",
    "Int5",
    "Int6",
    "Int8",
    "PruneReport",
    "QuantReport",
    "QuantRow",
    "dequantize_",
    "load",
    "load_",
    "prune_",
    "quantize_",
]
