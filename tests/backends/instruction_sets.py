"""The kernels of each instruction set that this machine has, judged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from llmkern import _native
from llmkern.testing.case import Call, Case
from llmkern.testing.compare import as_list
from llmkern.testing.judge import Judge

__all__ = ["assert_right_on_each", "here", "on"]


@contextlib.contextmanager
def on(isa: str) -> Iterator[None]:
    """The library set to one instruction set, which a failure names; ValueError where this CPU lacks it."""
    before = _native.cpu_isa()
    _native.set_cpu_isa(isa)
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"on {isa}: {error}") from error
    finally:
        _native.set_cpu_isa(before)


def here() -> list[str]:
    """The instruction sets that this CPU has."""
    found = []
    for isa in _native.CPU_ISAS:
        with contextlib.suppress(ValueError), on(isa):
            found.append(isa)
    return found


def assert_right_on_each(case: Case, make: Callable[[], Call], fn: Callable[..., Any]) -> None:
    """`assert_right` of `fn` on each instruction set; results with the bits of one that was judged are not again.

    Most are: kernels without matrix products are compiled for three sets only, and much else rounds alike.
    """
    judged: list[list[tuple[torch.Size, bytes]]] = []
    judge = Judge(case, make())
    for isa in here():
        with on(isa):
            call = make()
            out = fn(**call)
            bits = [(o.shape, o.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for o in as_list(out)]
            if bits not in judged:
                judge.assert_right(call, out)
                judged.append(bits)
