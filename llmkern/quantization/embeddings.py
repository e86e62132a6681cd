"""Find embeddings and the output heads tied to them, and decide which can be int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from llmkern.nn._quantized_weight import QuantizedWeight
from llmkern.quantization.layers import (
    FilterFn,
    Layer,
    places_of,
    said,
    stored,
    why_not_plain_embedding,
    why_skipped,
)

__all__ = ["EmbeddingLayer", "find_embeddings", "heads_of"]


@dataclass(frozen=True)
class EmbeddingLayer:
    """An embedding: its path, every place that holds it, the head tied to it, and why it is left ("" if it is not)."""

    path: str
    module: nn.Embedding
    places: tuple[tuple[nn.Module, str], ...]
    head: Layer | None
    reason: str


def heads_of(model: Any, layers: Sequence[Layer]) -> set[nn.Module]:
    """Return the layers that give the logits: named by the model, or sharing an embedding's weight."""
    tied = {stored(module) for module in model.modules() if isinstance(module, nn.Embedding)} - {None}
    head = said(model, "get_output_embeddings")
    return {layer.module for layer in layers if layer.module is head or stored(layer.module) in tied}


def find_embeddings(
    model: Any, layers: Sequence[Layer], skip: Sequence[str], filter_fn: FilterFn | None
) -> list[EmbeddingLayer]:
    """Return the embeddings tied to a layer, and a language model's input embedding; tables of positions stay as they
    are.
    """
    by_weight = {stored(layer.module): layer for layer in layers if stored(layer.module) is not None}
    has_head = said(model, "get_output_embeddings") is not None
    words = said(model, "get_input_embeddings") if has_head else None
    places = places_of(model)
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or isinstance(module, QuantizedWeight):
            continue
        head = by_weight.get(stored(module))
        if head is not None or module is words:
            reason = _why_leave(path, module, head, skip, filter_fn)
            found.append(EmbeddingLayer(path, module, tuple(places.get(module, ())), head, reason))
    return found


def _why_leave(
    path: str, module: nn.Embedding, head: Layer | None, skip: Sequence[str], filter_fn: FilterFn | None
) -> str:
    reason = why_skipped(path, skip) or why_not_plain_embedding(module)
    if reason:
        return reason
    if head is not None:
        return f"its weight is shared with {head.path}, which is left" if head.reason else ""
    if filter_fn is not None and not filter_fn(module, path):
        return "filter_fn returned False"
    return ""
