"""Checkpoints that `save_pretrained` wrote of a quantized model: compressed-tensors with int8 by channel, or packed.

vLLM reads them with kernels of its own; `quantization="llmkern"` reads them with llmkern's.  Layers that vLLM makes
one of several (q, k and v; gate and up) may differ in whether their inputs are rounded: the whole is then weight-only.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
)

from llmkern.integrations.vllm.config import AnyDeviceConfig
from llmkern.integrations.vllm.embedding import StoredEmbedding
from llmkern.integrations.vllm.weights import empty_int8, hold_int8, hold_packed, product
from llmkern.quantization.checkpoint import group_of, groups_of
from llmkern.quantization.formats import format_of_group
from llmkern.quantization.formats._awaiting import narrowest
from llmkern.quantization.formats.packed_int32 import read_pack_quantized

__all__ = ["CheckpointConfig", "StoredInt8", "StoredPacked", "register"]

METHOD = "llmkern"
_NAMELESS = "model.embed_tokens"
"""The embedding of Llama, which vLLM's model gives no name."""


@register_weight_loader_v2_supported_method
class StoredInt8(LinearMethodBase):
    """Linear layer with int8 codes and a scale for each row.  scheme: of `int8_linear`."""

    def __init__(self, scheme: str) -> None:
        super().__init__()
        self._scheme = scheme

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
        out, load = sum(output_partition_sizes), extra_weight_attrs["weight_loader"]
        codes, scale = empty_int8(out, input_size_per_partition)
        layer.register_parameter(
            "weight", ModelWeightParameter(data=codes, input_dim=1, output_dim=0, weight_loader=load)
        )
        layer.register_parameter(
            "weight_scale", ChannelQuantScaleParameter(data=scale, output_dim=0, weight_loader=load)
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        hold_int8(layer, layer.weight.data, layer.weight_scale.data)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return product(layer, x, bias, self._scheme)


@register_weight_loader_v2_supported_method
class StoredPacked(LinearMethodBase):
    """Linear layer with codes of 4, 5, 6 or 8 bits in int32 words.  weights: of a compressed-tensors config group."""

    def __init__(self, weights: dict[str, Any]) -> None:
        super().__init__()
        self._bits: int = weights["num_bits"]
        self._group: int = weights["group_size"] if weights["strategy"] == "group" else -1
        self._symmetric = bool(weights.get("symmetric", True))

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
        n, k, load = sum(output_partition_sizes), input_size_per_partition, extra_weight_attrs["weight_loader"]
        group, per_word = (k if self._group == -1 else self._group), Fraction(32, self._bits)
        if k % group or k * self._bits % 32 or (group == k and k != input_size):
            raise ValueError(f"{METHOD}: {k} of {input_size} columns on a rank are not whole groups of {group}")
        words: dict[str, Any] = {"input_dim": 1, "output_dim": 0, "packed_factor": per_word, "weight_loader": load}
        codes = torch.empty(n, k * self._bits // 32, dtype=torch.int32)
        layer.register_parameter("weight_packed", PackedvLLMParameter(data=codes, packed_dim=1, **words))
        scale = torch.empty(
            n, k // group
        )  # fp32, whatever the model's dtype is: it takes scales of any dtype as they are
        scales: dict[str, Any] = {"input_dim": 1, "output_dim": 0, "weight_loader": load}
        layer.register_parameter("weight_scale", GroupQuantScaleParameter(data=scale, **scales))
        shape = torch.empty(2, dtype=torch.int64)
        layer.register_parameter("weight_shape", BasevLLMParameter(data=shape, weight_loader=load))
        if not self._symmetric:
            zero = torch.empty(n * self._bits // 32, k // group, dtype=torch.int32)
            layer.register_parameter("weight_zero_point", PackedvLLMParameter(data=zero, packed_dim=0, **words))

    def process_weights_after_loading(self, layer: Any) -> None:
        found = {name: layer._parameters.pop(name) for name in list(layer._parameters) if name.startswith("weight_")}
        tensors = {name: tensor.data for name, tensor in found.items() if tensor is not None}
        n, words = tensors["weight_packed"].shape
        tensors["weight_shape"] = torch.tensor([n, words * 32 // self._bits])  # of the rank's part
        tensors["weight_scale"] = narrowest(tensors["weight_scale"])
        packed, _ = read_pack_quantized(tensors, self._bits)
        hold_packed(layer, packed)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return product(layer, x, bias, "auto")


class CheckpointConfig(AnyDeviceConfig):
    """Config of the quantization method `llmkern`.  description: the checkpoint's `quantization_config`.

    Raises ValueError for what llmkern has no kernels for.
    """

    def __init__(self, description: dict[str, Any]) -> None:
        super().__init__()
        for group in groups_of(description):
            format_of_group(group)
            if (group.get("weights") or {}).get("actorder"):
                raise ValueError(f"{METHOD}: the checkpoint's groups are not of neighbouring columns")
        self._description = description

    def get_name(self) -> str:
        return METHOD

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CheckpointConfig:
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        asked = user_quant == METHOD and hf_quant_cfg.get("quant_method") == "compressed-tensors"
        return METHOD if asked else None

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        is_embedding = isinstance(layer, VocabParallelEmbedding)
        prefix = prefix or _NAMELESS
        if not (is_embedding or isinstance(layer, LinearBase)):
            return None
        parent, _, leaf = prefix.rpartition(".")
        parts = [f"{parent}.{name}".lstrip(".") for name in self.packed_modules_mapping.get(leaf, [leaf])]
        kind = () if is_embedding else ("Linear",)  # what other programs' checkpoints call all of them
        found = [group_of(self._description, (part, *kind)) for part in parts]
        groups = [group for group in found if group is not None]
        if not groups:
            return UnquantizedEmbeddingMethod() if is_embedding else UnquantizedLinearMethod()
        weights = [group["weights"] for group in groups]
        if len(groups) != len(parts) or any(each != weights[0] for each in weights):
            raise ValueError(f"{METHOD}: {' and '.join(parts)} are one layer in vLLM, and quantized differently")
        form = format_of_group(groups[0]).name
        if is_embedding and form in ("int8", "int-quantized groups"):
            return StoredEmbedding(weights[0])
        if form == "int-quantized groups":
            raise ValueError(
                f"{METHOD}: {prefix} has groups of int8 codes, which are read of embeddings and heads alone"
            )
        if form != "int8":
            return StoredPacked(weights[0])
        return StoredInt8("auto" if all(group.get("input_activations") for group in groups) else "w8a16")


def register() -> None:
    """Register the quantization method."""
    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(CheckpointConfig)
