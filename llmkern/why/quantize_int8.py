from __future__ import annotations

from typing import Any


def build(make: Any, rows: int, hidden: int) -> dict[str, Any]:
    return {"x": make.randn(rows, hidden)}
