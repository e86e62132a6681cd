"""int8 codes with one fp32 scale per row: `weight` int8 [rows, columns], `weight_scale` fp32 [rows, 1]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from llmkern.nn import Int8Embedding, Int8Linear
from llmkern.nn._int8_weight import Int8Weight, quantized
from llmkern.nn._quantized_weight import with_hooks
from llmkern.nn.quantized_linear import is_conv1d, weight_out_in
from llmkern.quantization.formats import Format

__all__ = ["FORMAT"]

_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def _pack(weight: Tensor) -> dict[str, Tensor]:
    codes, scale = quantized("int8", weight)
    return {"weight": codes, "weight_scale": scale}


def _unpack(tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors["weight"].float() * tensors["weight_scale"].float()


def _group(module: Int8Weight) -> dict[str, Any]:
    quantizes_activations = isinstance(module, Int8Linear) and module.scheme != "w8a16"
    # Without a format of its own, a group that is weight-only would be read as packed into int32.
    activations = _ACTIVATIONS if quantizes_activations else None
    return {"weights": _WEIGHTS, "input_activations": activations, "format": "int-quantized"}


def _refuse(group: Mapping[str, Any]) -> str | None:
    if group.get("format") not in (None, "int-quantized", "naive-quantized"):
        return f"its format is {group['format']!r}, expected 'int-quantized'"
    for what, wanted in (("weights", _WEIGHTS), ("input_activations", _ACTIVATIONS)):
        given: Mapping[str, Any] | None = group.get(what)
        if given is None and what == "input_activations":  # weight-only
            continue
        for key, value in wanted.items():
            if (got := (given or {}).get(key)) != value:
                return f"its {what} have {key} {got!r}, expected {value!r}"
    return None


def _empty(path: str, module: nn.Module, group: Mapping[str, Any]) -> nn.Module:
    if isinstance(module, nn.Embedding):
        rows, columns = module.weight.shape
        return with_hooks(Int8Embedding(rows, columns, module.padding_idx, "meta", module.weight.dtype), module)
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        raise ValueError(f"{path} is int8 in the checkpoint, and a {type(module).__name__} in the model")
    weight = weight_out_in(module)
    out, k = weight.shape
    scheme = "auto" if group.get("input_activations") else "w8a16"
    linear = Int8Linear(k, out, module.bias is not None, "meta", weight.dtype, scheme=scheme)
    if module.bias is not None:
        linear.bias = module.bias  # type: ignore[assignment]
    linear.from_conv1d = is_conv1d(module)
    return with_hooks(linear, module)


def _takes(module: nn.Module) -> bool:
    return isinstance(module, (Int8Linear, Int8Embedding))


FORMAT = Format("int8", _refuse, _empty, _takes, _group, _pack, _unpack)
