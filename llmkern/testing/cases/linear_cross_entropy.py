from __future__ import annotations

from functools import partial
from typing import Any

import torch

from llmkern.testing.case import Call, Case, Make, each_dtype
from llmkern.testing.cases.cross_entropy import IGNORED, labels_for

__all__ = ["CASES"]


def _call(
    make: Make,
    rows: int,
    words: int,
    hidden: int = 24,
    *,
    bias: bool = False,
    class_weight: bool = False,
    int8: bool = False,
    **options: Any,
) -> Call:
    weight = make.randn(words, hidden)
    return {
        "hidden": make.randn(rows, hidden),
        "weight": make.randint(-127, 128, words, hidden, dtype=torch.int8) if int8 else weight,
        "bias": make.randn(words) if bias else None,
        "weight_scale": make.randn(words, 1, dtype=torch.float32).abs() / 100 if int8 else None,
        "labels": labels_for(make, rows, words),
        "class_weight": make.randn(words, dtype=torch.float32).abs() if class_weight else None,
        "scale": make.randn(rows, dtype=torch.float32).abs(),
        "ignore_index": IGNORED,
        "label_smoothing": 0.0,
        "z_loss": 0.0,
        "softcap": 0.0,
        "reduction": "sum",
        "hidden_grad": True,
        "weight_grad": not int8,
    } | options


def _all_ignored(make: Make) -> Call:
    call = _call(make, 3, 30, bias=True)
    return call | {"labels": torch.full_like(call["labels"], IGNORED)}


def _strided(make: Make) -> Call:
    call = _call(make, 6, 30)
    return call | {"hidden": make.randn(24, 6).T, "scale": make.tensor(0.25, torch.float32).expand(6)}


_FLOATING, _BIASED = ("hidden", "weight"), ("hidden", "weight", "bias")


def _add(name: str, differentiable: tuple[str, ...] = _FLOATING, **options: Any) -> list[Case]:
    return each_dtype("linear_cross_entropy", name, partial(_call, **options), differentiable=differentiable)


CASES = [
    *_add("1x1", rows=1, words=1),
    *_add("5x30", rows=5, words=30),
    *_add("5x30-bias", _BIASED, rows=5, words=30, bias=True),
    *_add("70x300-smoothed", rows=70, words=300, label_smoothing=0.1, z_loss=1e-3),
    *_add("7x30-everything", _BIASED, rows=7, words=30, bias=True, class_weight=True, label_smoothing=0.2, softcap=5.0),
    *_add("7x30-each-row", rows=7, words=30, reduction="none", hidden_grad=False, weight_grad=False),
    *_add("7x30-recomputed", rows=7, words=30, hidden_grad=False, weight_grad=False),
    *_add("7x30-hidden-only", ("hidden",), rows=7, words=30, weight_grad=False),
    *_add("7x30-no-scale", rows=7, words=30, scale=None),
    *_add("7x30-int8", ("hidden",), rows=7, words=30, int8=True),
    *each_dtype("linear_cross_entropy", "6x30-strided", _strided, differentiable=_FLOATING),
    *each_dtype("linear_cross_entropy", "3x30-all-ignored", _all_ignored, differentiable=_BIASED),
    *each_dtype("linear_cross_entropy", "0x30-empty", partial(_call, rows=0, words=30), dtypes=(torch.float32,)),
]
