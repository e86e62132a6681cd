"""The sizes and tensors that all normalisations share."""

from __future__ import annotations

from typing import Any

__all__ = ["norm", "residual_norm"]


def norm(make: Any, rows: int, hidden: int, *, bias: bool = False) -> dict[str, Any]:
    """x [rows, hidden] and its parameters."""
    arguments = {"x": make.randn(rows, hidden), "weight": make.randn(hidden)}
    return arguments | {"bias": make.randn(hidden)} if bias else arguments


def residual_norm(make: Any, rows: int, hidden: int, *, bias: bool = False) -> dict[str, Any]:
    """Like `norm`, with a residual of x's shape."""
    return norm(make, rows, hidden, bias=bias) | {"residual": make.randn(rows, hidden)}
