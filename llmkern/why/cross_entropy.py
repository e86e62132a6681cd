from __future__ import annotations

from typing import Any

import torch


def build(make: Any, rows: int, words: int) -> dict[str, Any]:
    return {"logits": make.randn(rows, words), "labels": make.randint(0, words, rows, dtype=torch.int64)}
