"""Embeddings and heads with an int8 weight, a scale for each row, or codes in groups, as a checkpoint has them.

The inputs of an int8 head are not rounded: logits are too many to lose anything.  The classes are none of vLLM's own
methods for floating-point embeddings, whose rows vLLM may read without asking the method.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.utils import set_weight_attrs

from llmkern.integrations.vllm.weights import empty_int8, hold_int8, hold_packed, product, rows
from llmkern.nn._int8_weight import quantized
from llmkern.quantization.formats._awaiting import narrowest
from llmkern.quantization.formats.int_groups import packed_levels

__all__ = ["QuantizedEmbedding", "StoredEmbedding"]


class _Int8Embedding(QuantizeMethodBase):
    """Products and rows of a weight that is held."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return product(layer, x, bias, "w8a16")

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        return rows(layer, input_, layer.llmkern_dtype)


class QuantizedEmbedding(_Int8Embedding):
    """Embedding or head that is quantized once it is loaded; those that are tied share their codes."""

    create_weights = UnquantizedEmbeddingMethod.create_weights

    def process_weights_after_loading(self, layer: Any) -> None:
        weight: Any = layer.weight
        if not hasattr(weight, "llmkern_int8"):
            weight.llmkern_int8 = quantized("llmkern", weight.data)
        layer.llmkern_dtype = weight.dtype
        hold_int8(layer, *weight.llmkern_int8)


class StoredEmbedding(_Int8Embedding):
    """Embedding or head whose codes and scales come from a checkpoint.  weights: of a compressed-tensors config group,
    int8 by channel or `int-quantized` in groups.
    """

    def __init__(self, weights: dict[str, Any]) -> None:
        super().__init__()
        self._bits: int = weights["num_bits"]
        self._group: int | None = weights["group_size"] if weights["strategy"] == "group" else None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        codes, scale = empty_int8(sum(output_partition_sizes), input_size_per_partition, self._group)
        for name, tensor in (("weight", codes), ("weight_scale", scale)):
            parameter = nn.Parameter(tensor, requires_grad=False)
            set_weight_attrs(parameter, {"output_dim": 0, **extra_weight_attrs})
            layer.register_parameter(name, parameter)
        layer.llmkern_dtype = params_dtype

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        layer.weight, layer.weight_scale = embed_tokens.weight, embed_tokens.weight_scale
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        codes, scale = layer.weight.data, layer.weight_scale.data
        if self._group is None:
            hold_int8(layer, codes, scale)
            return
        shared = layer.weight
        if not hasattr(shared, "llmkern_packed"):
            shared.llmkern_packed = packed_levels(codes, narrowest(scale), self._bits)
        hold_packed(layer, shared.llmkern_packed)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return product(layer, x, bias, "w8a16" if self._group is None else "auto")
