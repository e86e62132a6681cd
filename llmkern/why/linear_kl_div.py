from __future__ import annotations

from typing import Any


def build(make: Any, rows: int, words: int, hidden: int) -> dict[str, Any]:
    return {
        "hidden": make.randn(rows, hidden),
        "weight": make.randn(words, hidden, scale=hidden**-0.5),
        "teacher_hidden": make.randn(rows, hidden),
        "teacher_weight": make.randn(words, hidden, scale=hidden**-0.5),
    }
