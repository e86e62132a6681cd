"""What torch.compile is told about functions that it traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["constant_result"]

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_result(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`: the function is called while tracing, and its result is a constant.

    That decorator sets this mark too, but imports the compiler first: seconds and 100 MB for everyone, whether or not
    anything is ever compiled.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
