from __future__ import annotations

from functools import partial
from typing import Any

import torch

from llmkern.testing.case import Call, Make, each_dtype

__all__ = ["CASES", "labels_for"]

IGNORED = -100


def labels_for(make: Make, rows: int, words: int) -> torch.Tensor:
    """Labels of which about a quarter is ignored, the first never."""
    labels = make.randint(0, words, rows, dtype=torch.int64)
    ignored = make.randint(0, 4, rows, dtype=torch.int64) == 0
    ignored[:1] = False
    return labels.masked_fill(ignored, IGNORED)


def _call(make: Make, rows: int, words: int, *, weight: bool = False, scale: float = 3.0, **options: Any) -> Call:
    return {
        "logits": make.randn(rows, words, scale=scale),
        "labels": labels_for(make, rows, words),
        "weight": make.randn(words, dtype=torch.float32).abs() if weight else None,
        "ignore_index": IGNORED,
        "label_smoothing": 0.0,
        "z_loss": 0.0,
        "softcap": 0.0,
        "reduction": "none",
    } | options


def _strided(make: Make) -> Call:
    call = _call(make, 6, 40)
    return call | {"logits": make.randn(6, 50)[:, 5:45]}


def _infinite(make: Make) -> Call:
    """Words that are forbidden, but for the label."""
    call = _call(make, 4, 30)
    hidden = make.randint(0, 2, 4, 30, dtype=torch.int64) == 0
    hidden[torch.arange(4), call["labels"].clamp(min=0)] = False
    return call | {"logits": call["logits"].masked_fill(hidden, -torch.inf)}


def _nan(make: Make) -> Call:
    call = _call(make, 3, 30)
    call["logits"][0, 7] = torch.nan
    return call


def _all_ignored(make: Make) -> Call:
    call = _call(make, 3, 30)
    return call | {"labels": torch.full_like(call["labels"], IGNORED)}


def _add(name: str, build: Any, **options: Any) -> list:
    return each_dtype("cross_entropy", name, build, differentiable=("logits",), **options)


CASES = [
    *_add("1x1", partial(_call, rows=1, words=1)),
    *_add("3x7", partial(_call, rows=3, words=7)),
    *_add("5x300", partial(_call, rows=5, words=300)),
    *_add("3x5000", partial(_call, rows=3, words=5000)),
    *_add("9x100-large", partial(_call, rows=9, words=100, scale=50.0)),
    *_add("5x300-smoothed", partial(_call, rows=5, words=300, label_smoothing=0.1)),
    *_add("5x300-weight", partial(_call, rows=5, words=300, weight=True)),
    *_add("5x300-z-loss", partial(_call, rows=5, words=300, z_loss=1e-3)),
    *_add("5x300-softcap", partial(_call, rows=5, words=300, softcap=5.0)),
    *_add(
        "5x77-everything",
        partial(_call, rows=5, words=77, weight=True, label_smoothing=0.2, z_loss=1e-3, softcap=5.0),
    ),
    *_add("70x30-sum", partial(_call, rows=70, words=30, reduction="sum")),
    *_add("6x40-strided", _strided),
    *_add("3x30-all-ignored", _all_ignored),
    *_add("4x30-infinite", _infinite, dtypes=(torch.float32,)),
    *each_dtype("cross_entropy", "3x30-nan", _nan, dtypes=(torch.float32,)),
    *each_dtype("cross_entropy", "0x30-empty", partial(_call, rows=0, words=30), dtypes=(torch.float32,)),
]
