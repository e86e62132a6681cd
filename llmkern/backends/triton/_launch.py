"""Launching: what a launcher knows of the device, and the one place through which every kernel is started."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Target", "as_rows", "assume", "launch", "next_power_of_2", "target_of", "tracing", "warps"]


@dataclass(frozen=True)
class Target:
    """A device, as far as launchers look at it.

    arch: sm80, sm90, gfx942 …, or cpu for the interpreter.  multiprocessors: how many programs fill the device.
    name: the device's own, for the table of tuned configurations.
    """

    arch: str
    multiprocessors: int
    name: str


INTERPRETER = Target("cpu", 8, "interpreter")


class _Thread(threading.local):
    """tracing: kernels go through `wrap_triton`, for compilers to see.  assumed: for launches without a device."""

    tracing: bool = False
    assumed: Target | None = None
    recorder: Callable[..., None] | None = None


_thread = _Thread()
_targets: dict[torch.device, Target] = {}


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Within the block kernels are launched so that make_fx and torch.compile see them."""
    before, _thread.tracing = _thread.tracing, True
    try:
        yield
    finally:
        _thread.tracing = before


@contextlib.contextmanager
def assume(target: Target, recorder: Callable[..., None]) -> Iterator[None]:
    """Within the block launchers run as if on `target`, and `recorder(kernel, grid, arguments)` gets what they launch.

    Nothing is run, so meta tensors will do: this is how kernels are compiled, and measured, without a GPU.
    """
    before = _thread.assumed, _thread.recorder
    _thread.assumed, _thread.recorder = target, recorder
    try:
        yield
    finally:
        _thread.assumed, _thread.recorder = before


def target_of(tensor: Tensor) -> Target:
    """The device that a kernel on `tensor` runs on."""
    if _thread.assumed is not None:
        return _thread.assumed
    device = tensor.device
    if device not in _targets:
        _targets[device] = _target(device)
    return _targets[device]


def _target(device: torch.device) -> Target:
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm{properties.major}{properties.minor}"
    return Target(arch, properties.multi_processor_count, properties.name)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start `grid` programs of `kernel`; constants are its constexprs, and num_warps and num_stages."""
    if _thread.recorder is not None:
        _thread.recorder(kernel, grid, arguments, constants)
    elif _thread.tracing:
        torch.library.wrap_triton(kernel)[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)


def as_rows(x: Tensor) -> Tensor:
    """`x` as [rows, hidden] with contiguous rows: a view where its strides allow one, else a copy."""
    dims = x.dim()
    rows = x if dims == 2 else x.flatten(0, -2) if dims > 2 else x[None]
    return rows if rows.stride(1) == 1 else rows.contiguous()


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n < 2."""
    return 1 << max(n - 1, 0).bit_length()


def warps(elements: int) -> int:
    """Enough that a thread holds 16 of a program's elements."""
    return min(max(next_power_of_2(elements // 512), 1), 32)
