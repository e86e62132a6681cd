"""Compile what the Triton launchers launch, without a GPU, and read what the compiler made of it.

A launcher runs on meta tensors as if on a device (`_launch.assume`), so that what is compiled is what it would launch
there: the same specialisation, constants and configuration.  Triton's wheel brings ptxas and cuobjdump.  This needs a
process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkern.backends.triton._launch import Target, assume

__all__ = ["SHARED_LIMIT", "TARGETS", "Compiled", "Launch", "compiled", "launches", "meta"]

TARGETS = {
    "sm80": Target("sm80", 108, "NVIDIA A100"),
    "sm90": Target("sm90", 132, "NVIDIA H100"),
    "gfx942": Target("gfx942", 304, "AMD Instinct MI300X"),
}
SHARED_LIMIT = {"sm80": 163 * 1024, "sm90": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that one program may have."""
_WARP = {"sm80": 32, "sm90": 32, "gfx942": 64}
_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """One launch, as it was recorded."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """kernel: its name.  shared: bytes.  NVIDIA only: registers, stack (bytes per thread; spills are there), sass."""

    kernel: str
    shared: int
    registers: int
    stack: int
    sass: str

    def count(self, instruction: str) -> int:
        """How often a SASS instruction stands in the kernel, whatever its modifiers."""
        return len(re.findall(rf"\b{instruction}\b", self.sass))


def launches(target: str, call: Callable[[], Any]) -> list[Launch]:
    """What `call` would launch on `target`; its tensors may be on the meta device."""
    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        found.append(Launch(kernel, grid, arguments, constants))

    with assume(TARGETS[target], record):
        call()
    return found


def _type_of(value: Any) -> str:
    """As Triton's launcher specialises an argument."""
    if isinstance(value, Tensor):
        from triton.runtime.jit import type_canonicalisation_dict

        return "*" + type_canonicalisation_dict[str(value.dtype).removeprefix("torch.")]
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compiled(launch: Launch, target: str) -> Compiled:
    """The kernel of `launch`, compiled for `target`; raises where Triton or ptxas cannot."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    values = dict(zip(names, launch.arguments, strict=False)) | launch.constants
    options = {name: values.pop(name) for name in _OPTIONS if name in values}
    signature = {n: "constexpr" if n in launch.constants else _type_of(values[n]) for n in names}
    constants = {name: values[name] for name in names if signature[name] == "constexpr"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or (signature[n] in ("i32", "i64") and values[n] % 16 == 0)
    }
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)
    nvidia = target.startswith("sm")
    device = GPUTarget("cuda" if nvidia else "hip", int(target[2:]) if nvidia else target, _WARP[target])
    built = triton.compile(source, target=device, options=options)
    name = launch.kernel.__name__
    if not nvidia:
        return Compiled(name, built.metadata.shared, 0, 0, "")
    usage, sass = _cuobjdump(built.asm["cubin"])
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    return Compiled(name, built.metadata.shared, registers, stack, sass)


def _cuobjdump(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS) of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return usage, sass


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")
