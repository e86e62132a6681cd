"""Check the first tensor of `layers_`, and write its schemes in the form of the op's schema."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llmkern.checks import check_floating, shape_text
from llmkern.ops.int8_linear import resolve_scheme

__all__ = ["check_hidden", "resolve_schemes"]


def check_hidden(op: str, hidden: Tensor) -> None:
    """Check that hidden is floating point and has the shape [B, S, hidden]."""
    check_floating(op, hidden=hidden)
    if hidden.dim() != 3:
        raise ValueError(f"{op}: hidden has shape {shape_text(hidden.shape)}, expected [B, S, hidden]")


def resolve_schemes(schemes: str | Sequence[str], hidden: Tensor) -> str:
    """Resolve `scheme` to the form of the ops' schemas: one for all int8 weights, or one per linear layer, separated by
    commas.
    """
    if isinstance(schemes, str):
        schemes = schemes.split(",")
    return ",".join([resolve_scheme(scheme, hidden) for scheme in schemes])
