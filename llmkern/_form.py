"""Calls of a form that was served before, recognised in a fraction of a microsecond.

What a form is in Python (`dispatch`: shapes, strides, dtypes, devices and all other arguments) takes longer to write
down than a small op takes to compute.  torch.compile's guards compare tensors in C++, and more of them: their types,
whether they need gradients, and with their dispatch keys every mode and transform that is active.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Form", "form_of"]


class Form(NamedTuple):
    """A form of call, and who serves it.

    tensors, others: take the call's arguments as a tuple, return those that are tensors, and the rest.
    same: takes the tensors; whether they are like those of the form.  known: holds the form's other arguments.
    run: serves the call; arguments by position.
    """

    tensors: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    same: Callable[..., bool]
    others: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    known: frozenset[tuple[Any, ...]]
    run: Callable[..., Any]


def form_of(arguments: tuple[Any, ...], run: Callable[..., Any]) -> Form | None:
    """Return the form of a call, or None if torch cannot compare tensors so or an argument cannot be hashed."""
    where = [i for i, value in enumerate(arguments) if isinstance(value, Tensor)]
    tensors, others = _picking(where), _picking([i for i in range(len(arguments)) if i not in where])
    try:
        known = frozenset((others(arguments),))
    except TypeError:
        return None
    if not _can_compare():
        return None
    return Form(tensors, _guards(tensors(arguments)), others, known, run)


def _picking(places: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return a function that takes the elements at these ascending positions, as a tuple."""
    if len(places) < 2:  # of one place, itemgetter returns the element itself
        first = places[0] if places else 0
        return itemgetter(slice(first, first + len(places)))
    return itemgetter(*places)


def _guards(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    from torch._C._dynamo.guards import TensorGuards

    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    known: dict[str, Any] = {"dynamic_dims_sizes": sizes, "dynamic_dims_strides": strides}
    check: Callable[..., bool] = TensorGuards(*tensors, **known).check
    return check


@functools.cache
def _can_compare() -> bool:
    """Return True if this torch's private guards tell tensors apart as this file relies on."""
    like = torch.empty(2, 3)
    others = (
        torch.empty(3, 3),
        torch.empty(3, 2).t(),
        torch.empty(2, 3, dtype=torch.bfloat16),
        torch.empty(2, 3, device="meta"),
        torch.empty(2, 3, requires_grad=True),
        torch.nn.Parameter(like, requires_grad=False),
        None,
    )
    try:
        same = _guards((like, like))
        return same(torch.empty(2, 3), like) and not any([same(like, other) for other in others])
    except Exception:
        return False
