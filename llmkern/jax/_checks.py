"""Argument checks of the public functions: one line that names the argument, what was got, what is accepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmkern.checks import check_choice, check_finite, check_non_negative, shape_text

__all__ = ["FLOATING", "check_array", "check_choice", "check_finite", "check_non_negative", "check_shape"]

FLOATING = ("float32", "bfloat16")


def check_array(op: str, dtypes: Sequence[str] = FLOATING, /, **arrays: Any) -> None:
    """Check that each value that is not None is an array of one of these dtypes."""
    for name, array in arrays.items():
        if array is None:
            continue
        if not hasattr(array, "dtype") or not hasattr(array, "shape"):
            raise TypeError(f"{op}: {name} is a {type(array).__name__}, expected an array")
        if str(array.dtype) not in dtypes:
            raise TypeError(f"{op}: {name} is {array.dtype}, expected {' or '.join(dtypes)}")


def check_shape(op: str, name: str, array: Any, expected: Sequence[int], why: str) -> None:
    """Check that the array, if given, has exactly this shape; `why` says where the expectation comes from."""
    if array is not None and tuple(array.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} has shape {shape_text(array.shape)}, expected {shape_text(expected)} ({why})")
