from __future__ import annotations

from typing import Any


def build(make: Any, rows: int, hidden: int) -> dict[str, Any]:
    """hidden: of the result, as of each of the two inputs."""
    return {"gate": make.randn(rows, hidden), "up": make.randn(rows, hidden)}
