"""Tracing: what torch.compile is told about functions, and sizes that it leaves open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.compiler import is_compiling

__all__ = ["constant_result", "known"]

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_result(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`: the function is called while tracing, and its result is a constant.

    That decorator sets this mark too, but imports the compiler first: seconds and 100 MB for everyone, whether or not
    anything is ever compiled.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def known(condition: Any) -> bool:
    """Whether the comparison of sizes holds; False where a trace leaves a size open and it may or may not.

    A trace that read a comparison of an open size would hold for one of its outcomes only.
    """
    if is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return bool(condition)
