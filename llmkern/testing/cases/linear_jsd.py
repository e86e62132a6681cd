from __future__ import annotations

from functools import partial
from typing import Any

import torch

from llmkern.testing.case import Call, Case, Make, each_dtype
from llmkern.testing.cases.linear_kl_div import divergence_call

__all__ = ["CASES"]


def _call(make: Make, rows: int, words: int, beta: float = 0.5, **options: Any) -> Call:
    return divergence_call(make, rows, words, **options) | {"beta": beta}


_FLOATING, _BIASED = ("hidden", "weight"), ("hidden", "weight", "bias")


def _add(name: str, differentiable: tuple[str, ...] = _FLOATING, **options: Any) -> list[Case]:
    return each_dtype("linear_jsd", name, partial(_call, **options), differentiable=differentiable)


CASES = [
    *_add("1x1", rows=1, words=1),
    *_add("5x30", rows=5, words=30),
    *_add("70x300-bias", _BIASED, rows=70, words=300, bias=True, beta=0.1, temperature=2.0),
    *_add("7x30-forward", rows=7, words=30, beta=0.0),
    *_add("7x30-reverse", rows=7, words=30, beta=1.0),
    *_add("7x30-each-row", rows=7, words=30, reduction="none", hidden_grad=False, weight_grad=False),
    *_add("7x30-top", rows=7, words=30, top=5, beta=0.9),
    *each_dtype("linear_jsd", "0x30-empty", partial(_call, rows=0, words=30), dtypes=(torch.float32,)),
]
