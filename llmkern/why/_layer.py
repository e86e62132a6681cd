"""The linear layers that whole transformer layers share."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["linears"]


def linears(make: Any, sizes: dict[str, tuple[int, int]], int8: bool) -> dict[str, Any]:
    """<name>_weight [out, in] for each name, and with int8 its <name>_scale."""
    found: dict[str, Any] = {}
    for name, (rows, columns) in sizes.items():
        if int8:
            found[f"{name}_weight"] = make.randint(-127, 128, rows, columns, dtype=torch.int8)
            found[f"{name}_scale"] = make.randn(rows, 1, dtype=torch.float32)
        else:
            found[f"{name}_weight"] = make.randn(rows, columns)
    return found
