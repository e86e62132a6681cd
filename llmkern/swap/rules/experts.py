"""Packed experts outside of layers that are computed as a whole: known, reported, and left alone."""

from __future__ import annotations

from torch import nn

from llmkern.swap.match import Match

SWITCHES = ("mlp",)


def find(module: nn.Module) -> Match | None:
    packed = [p for p in module._parameters.values() if p is not None and p.dim() == 3]
    counts = {p.shape[0] for p in packed}
    if len(packed) < 2 or len(counts) != 1 or counts == {1}:  # [1, ...]: a vision model's tokens and positions
        return None
    said = f"its {packed[0].shape[0]} experts are packed in one tensor, which only a layer as a whole computes"
    return Match("experts", "", said)
