"""What `layers_` checks of its first tensor, and its schemes as its schema takes them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llmkern.checks import check_floating, shape_text
from llmkern.ops.int8_linear import resolve_scheme

__all__ = ["check_hidden", "resolve_schemes"]


def check_hidden(op: str, hidden: Tensor) -> None:
    """hidden is floating, [B, S, hidden]."""
    check_floating(op, hidden=hidden)
    if hidden.dim() != 3:
        raise ValueError(f"{op}: hidden has shape {shape_text(hidden.shape)}, expected [B, S, hidden]")


def resolve_schemes(schemes: str | Sequence[str], hidden: Tensor) -> str:
    """`scheme` as the ops' schemas take it: one for all int8 weights, or one for each linear layer with commas."""
    if isinstance(schemes, str):
        schemes = schemes.split(",")
    return ",".join([resolve_scheme(scheme, hidden) for scheme in schemes])
