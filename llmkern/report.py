"""`report`: what llmkern has done to a model, at any time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from llmkern.quantization.report import QuantReport
from llmkern.quantization.report import current as quantized
from llmkern.swap import SwapReport
from llmkern.swap.derive import is_swapped
from llmkern.swap.report import current as swapped

__all__ = ["Report", "is_optimized", "report"]


@dataclass(frozen=True)
class Report:
    """Reports of each part of llmkern on a model; prints as their tables.

    swap: of the last `optimize_`; None where there was none, or `restore_` undid it.
    quantization: None where nothing in the model is or was quantized.
    """

    swap: SwapReport | None = None
    quantization: QuantReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """`{"swap": {…}, "quantization": {…}}`, without the parts that have nothing to say."""
        return {name: part.to_dict() for name, part in vars(self).items() if part is not None}

    def __str__(self) -> str:
        parts = [str(part) for part in vars(self).values() if part is not None]
        return "\n\n".join(parts) or "llmkern has changed nothing in this model"


def report(model: nn.Module) -> Report:
    """Say what of `model` is swapped and quantized, and why the rest is not; adapters around it or not.

    Raises TypeError for what is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model is a {type(model).__name__}, expected a torch.nn.Module")
    return Report(swap=swapped(model), quantization=quantized(model))


def is_optimized(model: nn.Module) -> bool:
    """Return True if anything in `model` is swapped at the moment."""
    return any(is_swapped(module) for module in model.modules())
