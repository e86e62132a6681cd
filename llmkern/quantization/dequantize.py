"""Turn a quantized model back into floating-point layers: `dequantize_`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmkern.nn import QuantizedEmbedding, QuantizedLinear
from llmkern.nn._quantized_weight import QuantizedWeight
from llmkern.nn.quantized_linear import LinearOfConv1D, conv1d_of
from llmkern.quantization.checkpoint import forget_in_config
from llmkern.quantization.layers import places_of, put
from llmkern.quantization.methods import forget_methods
from llmkern.quantization.report import forget_report
from llmkern.quantization.undo import undoing

__all__ = ["dequantize_"]


@torch.inference_mode(mode=False)  # weights made within one can never be trained
def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every quantized linear layer by the nn.Linear, or Conv1D, that it was made of; returns the model.

    Every quantized embedding becomes an nn.Embedding; what shared its codes shares the floating-point weight again.

    The weights are codes times scales: those of the quantized model, not the original ones, which are gone.  Where
    `quantize_` smoothed, norms and weights stay folded, since only their product has a meaning; it is the same.
    dtype: of the new layers (default: what each had before, or was converted to since).
    Raises TypeError for what is no nn.Module, ValueError for a model without quantized layers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"dequantize_: model is a {type(model).__name__}, expected an nn.Module")
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    tables = [module for module in model.modules() if isinstance(module, QuantizedEmbedding)]
    written = [module for module in model.modules() if isinstance(module, LinearOfConv1D)]
    if not layers + tables + written or isinstance(model, QuantizedWeight):
        raise ValueError("dequantize_: model has no quantized layer in it")
    places = places_of(model)
    back: dict[nn.Module, nn.Module] = {
        layer: conv1d_of(layer.to_linear(dtype)) if layer.from_conv1d else layer.to_linear(dtype) for layer in layers
    }
    weights: dict[Tensor, nn.Parameter] = {layer.codes: back[layer].weight for layer in layers}  # type: ignore[misc]
    back |= {table: table.to_embedding(dtype, weights.get(table.codes)) for table in tables}
    back |= {linear: conv1d_of(linear).to(dtype or linear.weight.dtype) for linear in written}
    with undoing(model):
        for layer, module in back.items():
            put(places[layer], module)
        forget_in_config(model)
    forget_report(model)
    forget_methods(model)
    return model
