"""Floating-point checkpoints, quantized as vLLM loads them.

vLLM's own methods create and load the weights, each rank its part; a layer's weight is replaced when it is there.
Embeddings and the head become int8 by channel under every scheme (`embedding`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from llmkern.integrations.vllm import METHODS
from llmkern.integrations.vllm.config import AnyDeviceConfig
from llmkern.integrations.vllm.embedding import QuantizedEmbedding
from llmkern.integrations.vllm.weights import hold_quantized, product
from llmkern.quantization.schemes import LayerScheme, scheme_named

__all__ = ["QuantizedLinear", "SchemeConfig", "register"]


class QuantizedLinear(UnquantizedLinearMethod):
    """Linear layer whose weight is quantized once it is loaded."""

    supports_pre_processed_weights = False

    def __init__(self, scheme: LayerScheme) -> None:
        super().__init__()
        self._scheme = scheme

    def process_weights_after_loading(self, layer: Any) -> None:
        hold_quantized(layer, self._scheme)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return product(layer, x, bias, "auto")


class SchemeConfig(AnyDeviceConfig):
    """Config of a quantization method that stands for a scheme."""

    method: str
    scheme: LayerScheme

    def get_name(self) -> str:
        return self.method

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SchemeConfig:
        return cls()

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        if isinstance(layer, LinearBase):
            return QuantizedLinear(self.scheme)
        return QuantizedEmbedding() if isinstance(layer, VocabParallelEmbedding) else None


def register() -> None:
    """Register a quantization method for each scheme that has a name."""
    for method, name in METHODS.items():
        if method not in QUANTIZATION_METHODS:
            fields = {"method": method, "scheme": scheme_named(name), "__doc__": f"Config of {method}."}
            register_quantization_config(method)(type(f"{name}Config", (SchemeConfig,), fields))
