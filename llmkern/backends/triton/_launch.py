"""Launching: what a launcher knows of the device, and the one place through which every kernel is started."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmkern.scoped import assigned

__all__ = [
    "Kernel",
    "Target",
    "as_rows",
    "assume",
    "contiguous_like",
    "launch",
    "next_power_of_2",
    "scales_like",
    "target_of",
    "tracing",
    "warps",
]


@dataclass(frozen=True)
class Target:
    """A device, as far as launchers look at it.

    arch: sm80, sm90, gfx942 …, or cpu for the interpreter.  multiprocessors: how many programs fill the device.
    name: the device's own, for the table of tuned configurations.
    """

    arch: str
    multiprocessors: int
    name: str


class Kernel:
    """A kernel of `_kernels`, by name: the first launch imports it, and Triton with it."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name
        self.loaded: Any = None

    def load(self) -> Any:
        """Import and return the kernel, a `triton.jit` function."""
        module = importlib.import_module(f"llmkern.backends.triton._kernels.{self.module}")
        self.loaded = getattr(module, self.name)
        return self.loaded


INTERPRETER = Target("cpu", 8, "interpreter")


class _Thread(threading.local):
    """tracing: kernels go through `wrap_triton`, for compilers to see.  assumed: for launches without a device."""

    tracing: bool = False
    assumed: Target | None = None
    recorder: Callable[..., None] | None = None


_thread = _Thread()
_targets: dict[torch.device, Target] = {}


def tracing() -> AbstractContextManager[None]:
    """Within the block kernels are launched so that make_fx and torch.compile see them."""
    return assigned(_thread, tracing=True)


def assume(target: Target, recorder: Callable[..., None]) -> AbstractContextManager[None]:
    """Within the block launchers run as if on `target`, and `recorder(kernel, grid, arguments)` gets what they launch.

    Nothing is run, so meta tensors will do: this is how kernels are compiled, and measured, without a GPU.
    """
    return assigned(_thread, assumed=target, recorder=recorder)


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


def launch(kernel: Kernel, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start `grid` programs of `kernel`; constants are its constexprs, and num_warps and num_stages.

    The first argument is a tensor: kernels run on its device.
    """
    jit = kernel.loaded or kernel.load()
    if _thread.recorder is not None:
        _thread.recorder(jit, grid, arguments, constants)
    elif _thread.tracing:
        torch.library.wrap_triton(jit)[grid](*arguments, **constants)
    else:
        device = arguments[0].get_device()
        if device < 0 or device == torch.cuda.current_device():
            jit[grid](*arguments, **constants)
        else:  # Triton launches on the current device, wherever the tensors are
            with torch.cuda.device(device):
                jit[grid](*arguments, **constants)


def contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of x's shape and device, and of its dtype unless another is given."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def scales_like(x: Tensor) -> Tensor:
    """Room for one scale per row; a row without columns has nothing but that, and it is 0."""
    make = x.new_empty if x.shape[-1] else x.new_zeros
    return make((*x.shape[:-1], 1), dtype=torch.float32)


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """(x, the stride of its rows), whose elements are neighbours: itself, a view, or else a copy.

    A contiguous tensor stays as it is, of whatever rank: kernels look at its address only, and a view costs a
    microsecond.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    rows = x if x.dim() == 2 else x.flatten(0, -2) if x.dim() > 2 else x[None]
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n < 2."""
    return 1 << max(n - 1, 0).bit_length()


def warps(elements: int) -> int:
    """Enough that a thread holds 16 of a program's elements."""
    return min(max(next_power_of_2(elements // 512), 1), 32)
