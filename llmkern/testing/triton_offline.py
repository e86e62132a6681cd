"""Compile what the Triton launchers launch, without a GPU, and read what the compiler made of it.

A launcher runs on meta tensors as if on a device (`_launch.assume`), so that what is compiled is what it would launch
there: the same specialisation, constants and configuration.  Triton's wheel brings ptxas and cuobjdump.  This needs a
process without TRITON_INTERPRET.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmkern.backends.triton._launch import Target, assume

__all__ = ["INSTRUCTIONS", "SHARED_LIMIT", "TARGETS", "Compiled", "Launch", "compiled", "launches"]

TARGETS = {
    "sm80": Target("sm80", 108, "NVIDIA A100"),
    "sm90": Target("sm90", 132, "NVIDIA H100"),
    "gfx942": Target("gfx942", 304, "AMD Instinct MI300X"),
}
SHARED_LIMIT = {"sm80": 99 * 1024, "sm90": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that one program may have.  What sm_80 gets is for every architecture without entries of its
own, and sm_86, sm_89 and sm_120 have less than its 163 KiB."""
INSTRUCTIONS = ("LDGSTS", "HMMA", "HGMMA", "IMMA", "IGMMA")
"""Asynchronous copies to shared memory, and products on tensor cores: of a warp or a warpgroup, floating or int8."""
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
    """kernel: its name.  constants: its constexprs and options.  shared: bytes.  NVIDIA only: registers and sass."""

    kernel: str
    constants: dict[str, Any]
    shared: int
    registers: int
    sass: str

    @property
    def spills(self) -> int:
        """Instructions that store registers to, or load them from, a thread's own memory."""
        return self.count("STL") + self.count("LDL")

    def count(self, instruction: str) -> int:
        """Count a SASS instruction in the kernel, with any modifiers."""
        return len(re.findall(rf"\b{instruction}\b", self.sass))


def launches(target: str, call: Callable[[], Any]) -> list[Launch]:
    """Return the launches of `call` on `target`; its tensors may be on the meta device."""
    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        found.append(Launch(kernel, grid, arguments, constants))

    with assume(TARGETS[target], record):
        call()
    return found


def _type_of(value: Any) -> str:
    """Return the type of an argument, specialised as by Triton's launcher."""
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
        return Compiled(name, launch.constants, built.metadata.shared, 0, "")
    listing = _cuobjdump(built.asm["cubin"])
    registers = re.search(r"REG:(\d+)", listing)
    assert registers is not None
    return Compiled(name, launch.constants, built.metadata.shared, int(registers[1]), listing)


def _cuobjdump(cubin: bytes) -> str:
    """Resource usage and SASS of a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _aligned(launch: Launch) -> bool:
    """Return True if rows of the first two operands begin at multiples of 16 elements, as 16-byte copies need."""
    operands = [x for x in launch.arguments[:2] if isinstance(x, Tensor)]
    return all([stride % 16 == 0 for x in operands for stride in x.stride()[:-1]])


def main(ops: Sequence[str]) -> None:
    """Compile everything that `llmkern.testing.triton_calls` has for `ops`, one line of JSON for each."""
    from llmkern import dispatch
    from llmkern.testing.triton_calls import calls

    for op, target in itertools.product(ops, TARGETS):
        seen = set()
        for call in calls(op, target):
            for launch in launches(target, functools.partial(dispatch.implementation(op, "triton").fn, **call)):
                forms = tuple(_type_of(value) for value in launch.arguments)
                key = (launch.kernel.__name__, forms, str(launch.constants))
                if key in seen:
                    continue
                seen.add(key)
                made = compiled(launch, target)
                row = {
                    "op": op,
                    "target": target,
                    "kernel": made.kernel,
                    "constants": made.constants,
                    "dtype": forms[0],
                    "aligned": _aligned(launch),
                    "shared": made.shared,
                    "registers": made.registers,
                    "spills": made.spills,
                    **{name: made.count(name) for name in INSTRUCTIONS},
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
