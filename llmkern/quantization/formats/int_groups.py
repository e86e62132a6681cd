"""compressed-tensors' `int-quantized` with a scale for each group of columns, and codes of up to 8 bits in int8.

`weight` int8 [rows, columns], `weight_scale` [rows, groups].  So a vocabulary's weight is written that an output head
and an embedding share: transformers ties the two by the name `weight`, which packed weights do not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.nn import PackedEmbedding, PackedLinear
from llmkern.nn._packed_module import PackedModule
from llmkern.nn.quantized_linear import is_conv1d, weight_out_in
from llmkern.packed import BLOCK, CODES, PackedWeight
from llmkern.quantization.formats import Format
from llmkern.quantization.formats._awaiting import awaiting_embedding, awaiting_linear, group_size_of, narrowest
from llmkern.quantization.formats.blocks import pack_groups
from llmkern.quantization.formats.pack_quantized import described

__all__ = ["FORMAT", "packed_levels"]

BITS = (4, 5, 6, 8)


def _takes(module: nn.Module) -> bool:
    return isinstance(module, PackedEmbedding) or (isinstance(module, PackedLinear) and module.shares_codes)


def _refuse(group: Mapping[str, Any]) -> str | None:
    if group.get("format") not in ("int-quantized", "naive-quantized"):
        return f"its format is {group.get('format')!r}, expected 'int-quantized'"
    weights: Mapping[str, Any] = group.get("weights") or {}
    for key, accepted in (
        ("num_bits", BITS),
        ("type", ("int",)),
        ("symmetric", (True,)),
        ("strategy", ("group",)),
        ("dynamic", (False, None)),
    ):
        if weights.get(key) not in accepted:
            return f"its weights have {key} {weights.get(key)!r}, expected {' or '.join(map(repr, accepted))}"
    size = weights.get("group_size")
    if not isinstance(size, int) or size < BLOCK or size % BLOCK:
        return f"its weights have group_size {size!r}, expected a multiple of {BLOCK}"
    if group.get("input_activations"):
        return "its input_activations are quantized, expected those of a weight-only scheme: none"
    return None


def _empty(path: str, module: nn.Module, group: Mapping[str, Any]) -> nn.Module:
    bits = group["weights"]["num_bits"]
    if not isinstance(module, (nn.Embedding, nn.Linear)) and not is_conv1d(module):
        raise ValueError(f"{path} is int{bits} in the checkpoint, and a {type(module).__name__} in the model")
    n, k = (module.weight if isinstance(module, nn.Embedding) else weight_out_in(module)).shape
    size = group_size_of(path, k, group["weights"]["group_size"])
    tensors = {"weight": ((n, k), torch.int8), "weight_scale": ((n, k // size), torch.float32)}

    def read(given: dict[str, Tensor]) -> tuple[PackedWeight, Tensor | None]:
        return packed_levels(given["weight"], narrowest(given["weight_scale"]), bits), None

    if isinstance(module, nn.Embedding):
        return awaiting_embedding(path, module, tensors, read)
    return awaiting_linear(path, module, tensors, read)


def packed_levels(levels: Tensor, scale: Tensor, bits: int) -> PackedWeight:
    """Pack int8 levels [n, k] of `bits` bits with scales [n, groups].  Raises ValueError for wrong values."""
    shift = 0 if bits == 8 else 1 << bits - 1
    if shift and not bool(((levels >= -shift) & (levels < shift)).all()):
        raise ValueError(f"weight has levels beyond {-shift} … {shift - 1}, those of {bits} bits")
    if not bool(scale.isfinite().all()):
        raise ValueError("weight_scale has NaN or infinite values, expected finite ones")
    codes = levels if bits == 8 else (levels + shift).view(torch.uint8)
    return PackedWeight.from_rows(f"s{bits}", codes.contiguous(), scale.contiguous())


def _group(module: PackedModule) -> dict[str, Any]:
    packed = module.packed
    if f"s{CODES[packed.code].bits}" != packed.code or packed.super_scale is not None:
        raise ValueError(f"{module.kind}: a vocabulary in these blocks has no place in a compressed-tensors checkpoint")
    return described(module, "int-quantized")


def _write(module: PackedModule) -> dict[str, Tensor]:
    return _written(module.packed)


def _written(packed: PackedWeight) -> dict[str, Tensor]:
    codes, scale = packed.rows("codes"), packed.rows("scale")
    assert codes is not None
    assert scale is not None
    return {"weight": codes.view(torch.int8) - CODES[packed.code].shift, "weight_scale": scale}


def _pack(weight: Tensor) -> dict[str, Tensor]:
    return _written(pack_groups(weight, BLOCK))


def _unpack(tensors: Mapping[str, Tensor]) -> Tensor:
    levels, scale = tensors["weight"], tensors["weight_scale"].float()
    return levels.float() * scale.repeat_interleave(levels.shape[1] // scale.shape[1], 1)


FORMAT = Format("int-quantized groups", _refuse, _empty, _takes, _group, _pack, _unpack, write=_write)
