from __future__ import annotations

from typing import Any

import torch


def build(make: Any, rows: int, words: int, hidden: int) -> dict[str, Any]:
    return {
        "hidden": make.randn(rows, hidden),
        "weight": make.randn(words, hidden, scale=hidden**-0.5),
        "labels": make.randint(0, words, rows, dtype=torch.int64),
    }
