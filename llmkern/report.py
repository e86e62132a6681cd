"""`report`: what llmkern has done to a model, at any time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from llmkern.quantization.report import QuantReport
from llmkern.quantization.report import current as quantized

__all__ = ["Report", "report"]


@dataclass(frozen=True)
class Report:
    """What each part of llmkern says of a model; prints as their tables.

    quantization: None where nothing in the model is or was quantized.
    """

    quantization: QuantReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """`{"quantization": {…}}`, without the parts that have nothing to say."""
        return {name: part.to_dict() for name, part in vars(self).items() if part is not None}

    def __str__(self) -> str:
        parts = [str(part) for part in vars(self).values() if part is not None]
        return "\n\n".join(parts) or "llmkern has changed nothing in this model"


def report(model: nn.Module) -> Report:
    """What of `model` is quantized, and why the rest is not; of the model as it is now, adapters around it or not.

    Raises TypeError for what is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model is a {type(model).__name__}, expected a torch.nn.Module")
    return Report(quantization=quantized(model))
