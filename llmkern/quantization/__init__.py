"""int8 models: quantize_, its report, and the way back."""

from llmkern.quantization.checkpoint import load_
from llmkern.quantization.dequantize import dequantize_
from llmkern.quantization.quantize import quantize_
from llmkern.quantization.report import QuantReport, QuantRow

__all__ = ["QuantReport", "QuantRow", "dequantize_", "load_", "quantize_"]
