"""compressed-tensors' `pack-quantized`: codes of 4, 5, 6 or 8 bits in int32 words, with scales for groups of columns.

`weight_packed` int32 [rows, columns · bits / 32], `weight_scale` [rows, groups], `weight_shape` int64 [2], and of
asymmetric schemes `weight_zero_point` int32 [rows · bits / 32, groups].  A vocabulary's weight that an embedding shares
with the output head is in `int_groups.py`'s form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.nn import PackedLinear
from llmkern.nn._packed_module import PackedModule
from llmkern.nn.quantized_linear import is_conv1d, weight_out_in
from llmkern.packed import BLOCK, CODES, PackedWeight
from llmkern.quantization.formats import Format
from llmkern.quantization.formats._awaiting import awaiting_linear, group_size_of, narrowest
from llmkern.quantization.formats.blocks import pack_groups
from llmkern.quantization.formats.packed_int32 import (
    read_pack_quantized,
    why_not_pack_quantized,
    write_pack_quantized,
)

__all__ = ["FORMAT", "described"]


def _unpack(tensors: Mapping[str, Tensor]) -> Tensor:
    packed, permutation = read_pack_quantized(tensors, _bits(tensors))
    weight = packed.dequantized()
    return weight if permutation is None else torch.empty_like(weight).index_copy_(1, permutation, weight)


def _bits(tensors: Mapping[str, Tensor]) -> int:
    return 32 * tensors["weight_packed"].shape[1] // int(tensors["weight_shape"][1])


def _group(module: PackedModule) -> dict[str, Any]:
    if reason := why_not_pack_quantized(module.packed):
        raise ValueError(f"{module.kind}: {reason}")
    return described(module, "pack-quantized")


def described(module: PackedModule, form: str) -> dict[str, Any]:
    """Return a weight-only config group for a packed weight in groups.  form: the compressed-tensors format.

    Raises ValueError where the groups are not of neighbouring columns.
    """
    packed = module.packed
    if module.permutation is not None:
        raise ValueError(f"{module.kind}: its groups are not of neighbouring columns, as compressed-tensors' are")
    weights = {
        "num_bits": CODES[packed.code].bits,
        "type": "int",
        "symmetric": packed.zero is None,
        "strategy": "group",
        "group_size": packed.k // packed.scale.shape[1],
        "dynamic": False,
    }
    return {"weights": weights, "input_activations": None, "format": form}


def _refuse(group: Mapping[str, Any]) -> str | None:
    weights: Mapping[str, Any] = group.get("weights") or {}
    accepted: dict[str, tuple[Any, ...]] = {
        "num_bits": (4, 5, 6, 8),
        "type": ("int",),
        "strategy": ("group", "channel"),
        "dynamic": (False, None),
    }
    for key, values in accepted.items():
        if weights.get(key) not in values:
            wanted = " or ".join(repr(value) for value in values if value is not None)
            return f"its weights have {key} {weights.get(key)!r}, expected {wanted}"
    if weights["num_bits"] in (5, 6) and not weights.get("symmetric", True):
        return f"its weights have {weights['num_bits']} bits and zero points, expected symmetric ones"
    if weights["strategy"] == "channel" and weights["num_bits"] == 8 and group.get("format") != "pack-quantized":
        return "its codes are one to an int8"
    if weights["strategy"] == "group":
        size = weights.get("group_size")
        if not isinstance(size, int) or size < BLOCK or size % BLOCK:
            return f"its weights have group_size {size!r}, expected a multiple of {BLOCK}"
    if group.get("format") not in (None, "pack-quantized"):
        return f"its format is {group['format']!r}, expected 'pack-quantized'"
    if group.get("input_activations"):
        return "its input_activations are quantized, expected those of a weight-only scheme: none"
    return None


def _empty(path: str, module: nn.Module, group: Mapping[str, Any]) -> nn.Module:
    weights = group["weights"]
    bits = weights["num_bits"]
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        raise ValueError(f"{path} is int{bits} in the checkpoint, and a {type(module).__name__} in the model")
    n, k = weight_out_in(module).shape
    size = group_size_of(path, k, weights["group_size"] if weights["strategy"] == "group" else -1)
    tensors = {
        "weight_packed": ((n, -(-k * bits // 32)), torch.int32),
        "weight_scale": ((n, k // size), torch.float32),
        "weight_shape": ((2,), torch.int64),
    }
    if not weights.get("symmetric", True):
        tensors["weight_zero_point"] = ((-(-n * bits // 32), k // size), torch.int32)
    if weights.get("actorder") in ("group", True):
        tensors["weight_g_idx"] = ((k,), torch.int32)

    def read(given: dict[str, Tensor]) -> tuple[PackedWeight, Tensor | None]:
        given["weight_scale"] = narrowest(given["weight_scale"])
        return read_pack_quantized(given, bits)

    return awaiting_linear(path, module, tensors, read)


def _write(module: PackedModule) -> dict[str, Tensor]:
    return write_pack_quantized(module.packed)


def _pack(weight: Tensor) -> dict[str, Tensor]:
    return write_pack_quantized(pack_groups(weight, BLOCK))


def _takes(module: nn.Module) -> bool:
    return isinstance(module, PackedLinear) and not module.shares_codes


FORMAT = Format("pack-quantized", _refuse, _empty, _takes, _group, _pack, _unpack, write=_write)
