"""Vocabularies that change after quantization.

transformers' `resize_token_embeddings` and `tie_weights` know floating-point weights only: the first would fail, with
an int8 head half-way, and the second would leave codes of one layer with the scales of another.  So a quantized model
has its own, in its `__dict__`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llmkern.nn import Int8Embedding, Int8Linear
from llmkern.nn._int8_weight import Int8Weight
from llmkern.quantization.layers import places_of, replace, said
from llmkern.quantization.undo import undoing

__all__ = ["forget_vocabulary", "mind_vocabulary"]


def mind_vocabulary(model: nn.Module) -> None:
    """Let the transformers models in `model`, itself included, resize and tie int8 embeddings and heads."""
    for module in model.modules():
        for name in _METHODS:
            if callable(getattr(type(module), name, None)):
                module.__dict__[name] = _Method(name, module)


def forget_vocabulary(model: nn.Module) -> None:
    """Undo `mind_vocabulary`."""
    for module in model.modules():
        for name in _METHODS:
            if isinstance(module.__dict__.get(name), _Method):
                del module.__dict__[name]


class _Method:
    """A function of a model, kept in the model's own `__dict__`: it does not keep the model alive, and is copied and
    pickled with it."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self._name, self._model = name, weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _METHODS[self._name](self._model(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Method:
        model: Any = self._model()
        return _Method(self._name, memo.get(id(model), model))

    def __reduce__(self) -> Any:
        return _Method, (self._name, self._model())


def _resize_token_embeddings(model: Any, *args: Any, **kwargs: Any) -> Any:
    """As transformers', whose tokens keep their codes and scales; new ones are quantized as `quantize_` would."""
    table, head = (said(model, f"get_{which}_embeddings") for which in ("input", "output"))
    int8 = [module for module in dict.fromkeys((table, head)) if isinstance(module, Int8Weight)]
    configs = _sizes(model)
    try:
        with undoing(model):
            places = places_of(model)
            floating = _floating(int8)
            for module in int8:
                replace(places[module], floating[module])
            type(model).resize_token_embeddings(model, *args, **kwargs)
            made: dict[nn.Module, nn.Module] = {}
            # The head first: a table with its weight has its codes.
            for before, now in ((head, said(model, "get_output_embeddings")), (table, model.get_input_embeddings())):
                if isinstance(before, Int8Weight) and now not in made:
                    made[now] = _quantized_again(before, now, made)
            places = places_of(model)
            for now, again in made.items():
                replace(places[now], again)
    except BaseException:
        for holder, size in configs:
            holder.vocab_size = size
        raise
    return model.get_input_embeddings()


def _sizes(model: Any) -> list[tuple[Any, int]]:
    """Who says how large the vocabulary is."""
    return [(each, each.vocab_size) for each in (model.config.get_text_config(), model) if hasattr(each, "vocab_size")]


def _floating(int8: list[Any]) -> dict[nn.Module, nn.Module]:
    """fp32 layers in place of these; one weight where they share their codes."""
    found: dict[nn.Module, Any] = {each: each.to_linear(torch.float32) for each in int8 if isinstance(each, Int8Linear)}
    weights = {id(each.weight): linear.weight for each, linear in found.items()}
    return found | {
        each: each.to_embedding(torch.float32, weights.get(id(each.weight)))
        for each in int8
        if isinstance(each, Int8Embedding)
    }


def _quantized_again(before: Any, now: Any, made: dict[nn.Module, Any]) -> nn.Module:
    """`before` with the rows of `now`, a floating-point layer in its place."""
    rows = now.weight.shape[0]
    if rows == before.weight.shape[0]:
        return before
    tied = [again for other, again in made.items() if other.weight is now.weight]
    if isinstance(before, Int8Linear):
        again: Any = Int8Linear.from_linear(now, scheme=before.scheme)
        if before.bias is not None:
            again.bias = nn.Parameter(now.bias.detach().to(before.bias.dtype), before.bias.requires_grad)
    else:
        again = Int8Embedding.tied(now, tied[0]) if tied else Int8Embedding.from_embedding(now)
    kept = min(rows, before.weight.shape[0])
    with torch.no_grad():
        again.weight[:kept], again.weight_scale[:kept] = before.weight[:kept], before.weight_scale[:kept]
    again._floating = before._floating
    return again


def _tie_weights(model: Any, *args: Any, **kwargs: Any) -> Any:
    """As transformers'; codes that come from another layer come with its scales.  ValueError where only one of two
    layers is int8."""
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    before = [module.weight for _, module in layers]
    scales = {id(module.weight): module.weight_scale for _, module in layers if isinstance(module, Int8Weight)}
    with undoing(model):
        result = type(model).tie_weights(model, *args, **kwargs)
        for (path, module), weight in zip(layers, before, strict=True):
            now = module.weight
            if now is weight:
                continue
            if isinstance(module, Int8Weight) != (id(now) in scales):
                raise ValueError(
                    f"tie_weights: {path} is a {type(module).__name__}, and would be tied to a weight that is "
                    f"{now.dtype}; quantize both layers, or neither"
                )
            if isinstance(module, Int8Weight):
                module.weight_scale = scales[id(now)].clone()
    return result


_METHODS: dict[str, Callable[..., Any]] = {
    "resize_token_embeddings": _resize_token_embeddings,
    "tie_weights": _tie_weights,
}
