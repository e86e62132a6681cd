"""Packed weights as parameters of `layers_`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import _native
from llmkern.packed import PackedWeight

__all__ = ["form_of", "handle_of", "packed_behind", "unserved"]

_PACKED = "_llmkern_packed"


def handle_of(weight: PackedWeight) -> Tensor:
    """Return a tensor of one byte that represents a packed weight [N, K] as a linear layer's weight, without a scale.

    It keeps the weight's tensors: whatever is written to them counts.
    """
    served = _native.reason() is None and weight.codes.device.type == "cpu" and unserved(weight) is None
    handle = torch.ops.llmkern.layers_packed(**_arguments(weight)) if served else torch.zeros(1, dtype=torch.uint8)
    setattr(handle, _PACKED, weight)
    return handle


def packed_behind(tensor: Tensor | None) -> PackedWeight | None:
    """Return the packed weight that a tensor represents, or None."""
    return getattr(tensor, _PACKED, None)


def form_of(tensor: Tensor | None) -> Any:
    """Return what equal parameters have in common: shape, strides, dtype and device; for a packed weight, those of all
    its tensors.
    """
    if tensor is None:
        return None
    packed = packed_behind(tensor)
    if packed is None:
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    return packed.code, packed.n, *[(name, t.shape, t.dtype, t.device) for name, t in packed.tensors.items()]


def unserved(weight: PackedWeight) -> str | None:
    """Return the first tensor whose dtype the CPU's kernels do not read, with that dtype, or None."""
    taken = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8)
    return next((f"{name} is {t.dtype}" for name, t in weight.tensors.items() if t.dtype not in taken), None)


def _arguments(weight: PackedWeight) -> dict[str, Any]:
    names = ("codes", "scale", "zero", "offset", "super_scale", "super_offset", "code", "n")
    return {name: getattr(weight, name) for name in names}
