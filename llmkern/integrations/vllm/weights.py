"""A layer's weight in few bits, as parameters of vLLM's layer, and products with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmkern import ops
from llmkern.nn._int8_weight import quantized
from llmkern.packed import BLOCK, PackedWeight
from llmkern.quantization.formats.blocks import pack_groups, pack_int8_blocks, why_not_in_blocks
from llmkern.quantization.schemes import GROUPS, Int8, LayerScheme

__all__ = ["empty_int8", "hold_int8", "hold_packed", "hold_quantized", "product", "rows"]

_GROUPS = ("scale", "zero", "offset", "super_scale", "super_offset")


def hold_quantized(layer: Any, scheme: LayerScheme) -> None:
    """Replace a layer's floating-point `weight` [out, in] by its codes and scales.

    Nothing is measured, as `quantize_` does with inputs of the model: int4 is the nearest of each group, and a weight
    whose columns are no multiple of 32 gets int8 by channel.  Raises ValueError for values that are not finite.
    """
    weight: Tensor = layer.weight.data
    out, columns = weight.shape
    if (isinstance(scheme, Int8) and scheme.block is None) or why_not_in_blocks(out, columns, BLOCK):
        hold_int8(layer, *quantized("llmkern", weight))
    elif isinstance(scheme, Int8):
        hold_packed(layer, pack_int8_blocks(weight))
    else:
        group = max(size for size in GROUPS if size <= scheme.group and columns % size == 0)
        hold_packed(layer, pack_groups(weight, group, bits=scheme.code_bits, symmetric=scheme.symmetric))


def empty_int8(out: int, columns: int, group: int | None = None) -> tuple[Tensor, Tensor]:
    """int8 codes [out, columns] to be loaded, and fp32 scales for each row, or for each group of columns."""
    return torch.empty(out, columns, dtype=torch.int8), torch.empty(out, columns // group if group else 1)


def hold_int8(layer: Any, codes: Tensor, scale: Tensor) -> None:
    """Give the layer int8 codes [out, in] and fp32 scales [out, 1]."""
    _put(layer, weight=codes, weight_scale=scale)
    layer.llmkern_code = None


def hold_packed(layer: Any, packed: PackedWeight) -> None:
    """Give the layer a packed weight [out, in]."""
    _put(layer, weight=packed.codes, **{f"weight_{name}": getattr(packed, name) for name in _GROUPS})
    layer.llmkern_code, layer.llmkern_rows = packed.code, packed.n


def _put(layer: Any, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        layer._parameters.pop(name, None)
        layer.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))


def product(layer: Any, x: Tensor, bias: Tensor | None, scheme: str) -> Tensor:
    """`x · weightᵀ + bias`, [..., out].  scheme: of `int8_linear`; packed weights round x in blocks of 32."""
    if layer.llmkern_code is None:
        return ops.int8_linear(x, layer.weight, layer.weight_scale, bias, scheme=scheme)
    packed = _packed(layer)
    groups = {name: getattr(packed, name) for name in _GROUPS}
    return ops.quantized_linear(x, packed.codes, **groups, bias=bias, code=packed.code, n=packed.n)


def rows(layer: Any, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Look up rows of a held weight, [..., in]."""
    if layer.llmkern_code is not None:
        return _packed(layer).take(ids).to(dtype)
    found: Tensor = layer.weight[ids] * layer.weight_scale[ids]
    return found.to(dtype)


def _packed(layer: Any) -> PackedWeight:
    groups = {name: getattr(layer, f"weight_{name}") for name in _GROUPS}
    return PackedWeight(layer.llmkern_code, layer.llmkern_rows, layer.weight, **groups)
