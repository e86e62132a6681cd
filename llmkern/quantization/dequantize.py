"""`dequantize_`: back to floating-point linear layers."""

from __future__ import annotations

import torch
from torch import nn

from llmkern.nn import Int8Linear
from llmkern.quantization.checkpoint import forget_in_config
from llmkern.quantization.layers import places_of
from llmkern.quantization.undo import undoing

__all__ = ["dequantize_"]


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every Int8Linear by the nn.Linear, or Conv1D, that it was made of; returns the model.

    The weights are codes times scales: those of the quantized model, not the original ones, which are gone.  Where
    `quantize_` smoothed, norms and weights stay folded, since only their product has a meaning; it is the same.
    dtype: of the new layers (default: what each had before, or was converted to since).
    Raises TypeError for what is no nn.Module, ValueError for a model without Int8Linear.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"dequantize_: model is a {type(model).__name__}, expected an nn.Module")
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    if not layers or isinstance(model, Int8Linear):
        raise ValueError("dequantize_: model has no Int8Linear in it")
    places = places_of(model)
    back = [layer.to_conv1d(dtype) if layer.from_conv1d else layer.to_linear(dtype) for layer in layers]
    with undoing(model):
        for layer, module in zip(layers, back, strict=True):
            for parent, attribute in places[layer]:
                setattr(parent, attribute, module)
        forget_in_config(model)
    return model
