"""`dequantize_`: back to floating-point linear layers."""

from __future__ import annotations

import torch
from torch import nn

from llmkern.nn import Int8Embedding, Int8Linear
from llmkern.nn._int8_weight import Int8Weight
from llmkern.quantization.checkpoint import forget_in_config
from llmkern.quantization.layers import places_of, replace
from llmkern.quantization.undo import undoing
from llmkern.quantization.vocabulary import forget_vocabulary

__all__ = ["dequantize_"]


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every Int8Linear by the nn.Linear, or Conv1D, that it was made of; returns the model.

    Every Int8Embedding becomes an nn.Embedding; what shared its codes shares the floating-point weight again.

    The weights are codes times scales: those of the quantized model, not the original ones, which are gone.  Where
    `quantize_` smoothed, norms and weights stay folded, since only their product has a meaning; it is the same.
    dtype: of the new layers (default: what each had before, or was converted to since).
    Raises TypeError for what is no nn.Module, ValueError for a model without int8 layers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"dequantize_: model is a {type(model).__name__}, expected an nn.Module")
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    tables = [module for module in model.modules() if isinstance(module, Int8Embedding)]
    if not layers + tables or isinstance(model, Int8Weight):
        raise ValueError("dequantize_: model has no Int8Linear in it")
    places = places_of(model)
    back: dict[nn.Module, nn.Module] = {
        layer: layer.to_conv1d(dtype) if layer.from_conv1d else layer.to_linear(dtype) for layer in layers
    }
    weights = {id(layer.weight): back[layer].weight for layer in layers}
    back |= {table: table.to_embedding(dtype, weights.get(id(table.weight))) for table in tables}  # type: ignore[arg-type]
    with undoing(model):
        for layer, module in back.items():
            replace(places[layer], module)
        forget_in_config(model)
    forget_vocabulary(model)
    return model
