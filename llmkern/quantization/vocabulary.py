"""Resize vocabularies after quantization: kept rows keep their codes, and tied weights keep their scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmkern.nn import Int8Embedding, Int8Linear, PackedEmbedding, PackedLinear, QuantizedLinear
from llmkern.nn._int8_weight import Int8Weight
from llmkern.nn._packed_module import PackedModule
from llmkern.nn._quantized_weight import QuantizedWeight
from llmkern.nn._weight_view import WeightView
from llmkern.nn.quantized_embedding import QuantizedEmbedding
from llmkern.quantization.formats.blocks import extended, why_not_extended
from llmkern.quantization.layers import places_of, put, said
from llmkern.quantization.undo import undoing
from llmkern.swap.derive import original_class

__all__ = ["resize_token_embeddings", "tie_weights"]


def resize_token_embeddings(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Resize as transformers does; existing tokens keep their codes and scales, and new ones are quantized as by
    `quantize_`.
    """
    table, head = (said(model, f"get_{which}_embeddings") for which in ("input", "output"))
    for module in (table, head):
        if isinstance(module, PackedModule) and why_not_extended(module.packed):
            raise ValueError(
                f"resize_token_embeddings: the vocabulary's weight is {module.kind}, to which no rows can be added; "
                "llmkern.dequantize_(model) can be resized"
            )
    quantized = [module for module in dict.fromkeys((table, head)) if isinstance(module, QuantizedWeight)]
    configs = _sizes(model)
    try:
        with undoing(model):
            places = places_of(model)
            floating = _floating(quantized)
            for module in quantized:
                put(places[module], floating[module])
            original_class(model).resize_token_embeddings(model, *args, **kwargs)
            made: dict[nn.Module, nn.Module] = {}
            # The head first: a table with its weight has its codes.
            for before, now in ((head, said(model, "get_output_embeddings")), (table, model.get_input_embeddings())):
                if isinstance(before, QuantizedWeight) and now not in made:
                    made[now] = _quantized_again(before, now, made)
            places = places_of(model)
            for now, again in made.items():
                put(places[now], again)
    except BaseException:
        for holder, size in configs:
            holder.vocab_size = size
        raise
    return model.get_input_embeddings()


def _sizes(model: Any) -> list[tuple[Any, int]]:
    """Return the objects that state the vocabulary's size (text config, model), each with that size."""
    return [(each, each.vocab_size) for each in (model.config.get_text_config(), model) if hasattr(each, "vocab_size")]


def _floating(quantized: list[Any]) -> dict[nn.Module, nn.Module]:
    """Return fp32 layers in place of these; one weight for layers that share their codes."""
    linears = [each for each in quantized if isinstance(each, QuantizedLinear)]
    found: dict[nn.Module, Any] = {each: each.to_linear(torch.float32) for each in linears}
    weights = {each.codes: linear.weight for each, linear in found.items()}
    return found | {
        each: each.to_embedding(torch.float32, weights.get(each.codes))
        for each in quantized
        if isinstance(each, QuantizedEmbedding)
    }


def _quantized_again(before: Any, now: Any, made: dict[nn.Module, Any]) -> nn.Module:
    """Return `before` with the rows of `now`, the floating-point layer in its place."""
    rows = now.weight.shape[0]
    if rows == before.weight_size[0]:
        return before
    tied = [again for other, again in made.items() if other.weight is now.weight]
    again: Any
    if isinstance(before, QuantizedLinear):
        if isinstance(before, Int8Linear):
            again = Int8Linear.from_linear(now, scheme=before.scheme)
        else:
            assert isinstance(before, PackedLinear)
            again = PackedLinear.from_linear(now, extended(before.packed, now.weight))
        if before.bias is not None:
            again.bias = nn.Parameter(now.bias.detach().to(before.bias.dtype), before.bias.requires_grad)
    elif tied:
        again = type(before).tied(now, tied[0])
    elif isinstance(before, Int8Embedding):
        again = Int8Embedding.from_embedding(now)
    else:
        again = PackedEmbedding.from_embedding(now, extended(before.packed, now.weight))
    if isinstance(before, Int8Weight):
        kept = min(rows, before.codes.shape[0])
        with torch.no_grad():
            again.codes[:kept], again.weight_scale[:kept] = before.codes[:kept], before.weight_scale[:kept]
    again.to(before.dtype)
    return again


def tie_weights(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Like transformers' `tie_weights`; codes taken from another layer come with its scales.  Raises
    ValueError if only one of two tied layers is quantized."""
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    codes = {module: module.codes for _, module in layers if isinstance(module, QuantizedWeight)}
    with undoing(model):
        result = original_class(model).tie_weights(model, *args, **kwargs)
        for path, module in layers:
            # A plain layer that was given the weight of a quantized one, or one that has become a plain layer.
            if isinstance(module._parameters["weight"], WeightView) or (module in codes) != isinstance(
                module, QuantizedWeight
            ):
                raise ValueError(
                    f"tie_weights: {path} and the layer that it would be tied to are not both quantized; quantize both "
                    "layers, or neither"
                )
    return result
