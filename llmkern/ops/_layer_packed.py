"""Packed weights among the parameters of `layers_`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import _native
from llmkern.packed import PackedWeight

__all__ = ["form_of", "handle_of", "packed_behind", "unserved"]

_PACKED = "_llmkern_packed"


def handle_of(weight: PackedWeight) -> Tensor:
    """A tensor of one byte that stands for a packed weight [N, K] as the weight of a linear layer, without a scale.

    It keeps the weight's tensors: whatever is written to them counts.
    """
    served = _native.reason() is None and weight.codes.device.type == "cpu" and unserved(weight) is None
    handle = torch.ops.llmkern.layers_packed(**_arguments(weight)) if served else torch.zeros(1, dtype=torch.uint8)
    setattr(handle, _PACKED, weight)
    return handle


def packed_behind(tensor: Tensor | None) -> PackedWeight | None:
    """The packed weight that a tensor stands for, or None."""
    return getattr(tensor, _PACKED, None)


def form_of(tensor: Tensor | None) -> Any:
    """What alike parameters have in common: shape, strides, dtype and device, of a packed weight those of all of it."""
    if tensor is None:
        return None
    packed = packed_behind(tensor)
    if packed is None:
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    return packed.code, packed.n, *[(name, t.shape, t.dtype, t.device) for name, t in packed.tensors.items()]


def unserved(weight: PackedWeight) -> str | None:
    """The dtype that the CPU's kernels do not read, or None."""
    taken = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8)
    return next((f"{name} is {t.dtype}" for name, t in weight.tensors.items() if t.dtype not in taken), None)


def _arguments(weight: PackedWeight) -> dict[str, Any]:
    names = ("codes", "scale", "zero", "offset", "super_scale", "super_offset", "code", "n")
    return {name: getattr(weight, name) for name in names}
