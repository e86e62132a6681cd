"""Declarations of ops with a native kernel for CUDA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmkern.backends.cpu._rows import DTYPES, refuse_norm, refuse_strided
from llmkern.backends.cuda import CUDA, _plan
from llmkern.dispatch import GivesWay, implements
from llmkern.library import native

__all__ = ["MAX_ROW", "refuse_rows", "serves", "serves_norm", "serves_norm_backward"]

MAX_ROW = 2**30
"""Threads that share a row count its elements in 32 bits."""


def serves(
    op: str,
    *,
    refuse: Callable[..., str | None],
    describe: Callable[..., str] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = DTYPES,
    has_backward: bool = False,
    for_gradient: Mapping[str, Any] | None = None,
    copies: Callable[..., str | None] | None = None,
    gives_way: GivesWay | None = None,
) -> None:
    """`torch.ops.llmkern.<op>` as CUDA's implementation, from Ampere on."""
    declare = implements(
        op,
        CUDA,
        dtypes=dtypes,
        min_capability=(8, 0),
        has_backward=has_backward,
        refuse=refuse,
        describe=describe,
        for_gradient=for_gradient,
        copies=copies,
        gives_way=gives_way,
    )
    declare(native(op))


def serves_norm(op: str, *, has_backward: bool = False) -> None:
    """Any of the normalisations."""
    serves(op, refuse=_refuse_norm, describe=_plan.norm, has_backward=has_backward)


def serves_norm_backward(op: str) -> None:
    serves(op, refuse=_refuse_norm_backward)


def refuse_rows(**tensors: Tensor) -> str | None:
    """Return which tensor's rows are not contiguous, or too long to be shared among threads, or None."""
    for name, tensor in tensors.items():
        if tensor.dim() > 0 and tensor.shape[-1] > MAX_ROW:
            return f"{name} has rows of {tensor.shape[-1]} elements; at most {MAX_ROW} are taken"
    return refuse_strided(**tensors)


def _refuse_norm(x: Tensor, **call: Any) -> str | None:
    return refuse_rows(x=x) or refuse_norm(x=x, **call)


def _refuse_norm_backward(dy: Tensor, **call: Any) -> str | None:
    return refuse_rows(dy=dy) or refuse_norm(**call)
