from __future__ import annotations

from functools import partial
from typing import Any

import torch

from llmkern.testing.case import Call, Case, Make, each_dtype

__all__ = ["CASES", "divergence_call"]


def divergence_call(
    make: Make,
    rows: int,
    words: int,
    hidden: int = 24,
    teacher: int = 40,
    *,
    bias: bool = False,
    top: int | None = None,
    **options: Any,
) -> Call:
    """A call of either divergence, but for the argument that only one of them has.

    top: give as many of the teacher's logits in place of its head, 0 for all of them.
    """
    scale = make.randn(rows, dtype=torch.float32).abs()
    call: Call = {
        "hidden": make.randn(rows, hidden),
        "weight": make.randn(words, hidden),
        "bias": make.randn(words) if bias else None,
        "teacher_hidden": make.randn(rows, teacher),
        "teacher_weight": make.randn(words, teacher),
        "teacher_bias": make.randn(words) if bias else None,
        "teacher_logits": None,
        "teacher_words": None,
        "scale": scale.masked_fill(torch.arange(rows, device=scale.device) % 4 == 1, 0),
        "temperature": 1.0,
        "reduction": "sum",
        "hidden_grad": True,
        "weight_grad": True,
    } | options
    if top is None:
        return call
    call |= dict.fromkeys(("teacher_hidden", "teacher_weight", "teacher_bias"))
    if top == 0:
        return call | {"teacher_logits": make.randn(rows, words)}
    which = torch.stack([torch.arange(row, row + top) * 7 % words for row in range(rows)])
    return call | {"teacher_logits": make.randn(rows, top), "teacher_words": which.to(scale.device)}


def _call(make: Make, rows: int, words: int, reverse: bool = False, **options: Any) -> Call:
    return divergence_call(make, rows, words, **options) | {"reverse": reverse}


def _none_counts(make: Make) -> Call:
    call = _call(make, 3, 30, bias=True)
    return call | {"scale": torch.zeros_like(call["scale"])}


def _strided(make: Make) -> Call:
    call = _call(make, 6, 30)
    scale = make.tensor(0.25, torch.float32).expand(6)
    return call | {"hidden": make.randn(24, 6).T, "teacher_hidden": make.randn(40, 6).T, "scale": scale}


_FLOATING, _BIASED = ("hidden", "weight"), ("hidden", "weight", "bias")


def _add(name: str, differentiable: tuple[str, ...] = _FLOATING, **options: Any) -> list[Case]:
    return each_dtype("linear_kl_div", name, partial(_call, **options), differentiable=differentiable)


CASES = [
    *_add("1x1", rows=1, words=1),
    *_add("5x30", rows=5, words=30),
    *_add("70x300-bias", _BIASED, rows=70, words=300, bias=True, temperature=2.0),
    *_add("7x30-reverse", _BIASED, rows=7, words=30, bias=True, reverse=True, temperature=2.0),
    *_add("7x30-each-row", rows=7, words=30, reduction="none", hidden_grad=False, weight_grad=False),
    *_add("7x30-logits", rows=7, words=30, top=0, temperature=2.0),
    *_add("7x30-top", rows=7, words=30, top=5),
    *_add("7x30-hidden-only", ("hidden",), rows=7, words=30, weight_grad=False),
    *each_dtype("linear_kl_div", "6x30-strided", _strided, differentiable=_FLOATING),
    *each_dtype("linear_kl_div", "3x30-none-counts", _none_counts, differentiable=_BIASED),
    *each_dtype("linear_kl_div", "0x30-empty", partial(_call, rows=0, words=30), dtypes=(torch.float32,)),
]
