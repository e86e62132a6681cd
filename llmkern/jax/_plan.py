"""Launches as data: grid, blocks and their VMEM, as `llmkern why` shows them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from llmkern.jax._chips import Chip

__all__ = ["LANES", "Block", "Plan", "cdiv"]

LANES = 128
COMPILER = 2**18
"""Bytes of VMEM beside blocks and values; libtpu 0.0.42 takes up to half of that to change a small array's layout."""
SMEM_BUDGET = 2**19
"""Bytes of scalars that a launch may prefetch: half of what every chip has."""
_BYTES = {"float32": 4, "int32": 4, "bfloat16": 2, "int8": 1}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _up(size: int, multiple: int) -> int:
    return cdiv(size, multiple) * multiple


@dataclass(frozen=True)
class Block:
    """One array of a launch.

    shape: the array's.  block: what one step of the grid sees of it.  index: takes the grid's indices (and the
    prefetched arrays) to the block's place, in blocks; None where a step sees the whole array.
    memory: "smem" holds scalars.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    block: tuple[int, ...]
    index: Callable[..., tuple[Any, ...]] | None = None
    memory: Literal["vmem", "smem"] = "vmem"

    @property
    def array_bytes(self) -> int:
        """Size of the whole array in bytes."""
        return math.prod(self.shape) * _BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        """VMEM of one block in bytes: rows are padded to 128 lanes, columns to the dtype's 8, 16 or 32 sublanes."""
        if self.memory == "smem":
            return 0
        size = _BYTES[self.dtype]
        *outer, rows, columns = (1, 1, *self.block)
        return math.prod(outer) * _up(rows, 32 // size) * _up(columns, LANES) * size

    def __str__(self) -> str:
        return f"{self.name} {'×'.join(map(str, self.block))}"


@dataclass(frozen=True)
class Plan:
    """Launch of a kernel.

    prefetch: scalars that are in SMEM before the first step, for the index maps.  inputs, outputs: blocks that
    are copied while the step before computes.  scratch: kept between the steps.  values: arrays that the kernel makes
    for itself, which the compiler keeps in VMEM beside the blocks.
    semantics: for each dimension of the grid "parallel", or "arbitrary" where steps build on the ones before.
    operations, dtype: of the call's products.
    """

    kernel: str
    chip: Chip
    grid: tuple[int, ...]
    semantics: tuple[Literal["parallel", "arbitrary"], ...]
    inputs: tuple[Block, ...]
    outputs: tuple[Block, ...]
    scratch: tuple[Block, ...] = ()
    prefetch: tuple[Block, ...] = ()
    values: tuple[Block, ...] = ()
    operations: float = 0
    dtype: str = "float32"

    @property
    def vmem(self) -> int:
        """VMEM in bytes: two of each block that is copied, one of each other, and the compiler's share."""
        copied = sum(2 * block.bytes for block in (*self.inputs, *self.outputs))
        return COMPILER + copied + sum(block.bytes for block in (*self.scratch, *self.values))

    @property
    def floor(self) -> float:
        """Least time in seconds: each array read or written once, every product computed."""
        # A paged cache is one array, but an input for each block of a step.
        arrays = {block.name.rstrip("0123456789"): block.array_bytes for block in (*self.inputs, *self.outputs)}
        return self.chip.seconds(sum(arrays.values()), self.operations, self.dtype)

    def refusal(self) -> str | None:
        """Return why the chip cannot run this, or None."""
        scalars = sum(block.array_bytes for block in self.prefetch)
        if scalars > SMEM_BUDGET:
            names = " and ".join([block.name for block in self.prefetch])
            return f"{names} have {scalars} bytes, at most {SMEM_BUDGET} fit in SMEM"
        if self.dtype == "int8" and not self.chip.int8:
            return f"{self.chip.name} has no int8 products"
        if self.vmem > self.chip.budget:
            return (
                f"{self.kernel} would take {self.vmem / 2**20:.1f} MiB of VMEM with its smallest blocks "
                f"({', '.join(map(str, (*self.inputs, *self.outputs)))}); "
                f"{self.chip.name} has {self.chip.budget / 2**20:.0f} MiB for a kernel"
            )
        return None

    def __str__(self) -> str:
        blocks = ", ".join(map(str, (*self.inputs, *self.outputs)))
        return (
            f"{self.kernel} on {self.chip.name}: {blocks}; grid {'×'.join(map(str, self.grid))}; "
            f"VMEM {self.vmem / 2**20:.2f} of {self.chip.vmem / 2**20:.0f} MiB; at least {self.floor * 1e6:.3g} µs"
        )
