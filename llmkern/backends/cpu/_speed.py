"""Sizes at which PyTorch was measured to be faster than a native kernel, per op, instruction set and dtype, as data.

speed.json has what `llmkern tune OP --device cpu` found on a machine of that instruction set; a user's own table, which
the same command writes, comes before it.  Of an instruction set that both lack the next lower one's is taken.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmkern import _native
from llmkern._compile import constant_result
from llmkern.config import settings
from llmkern.dispatch import known

__all__ = ["BUILT_IN", "MeasuredSizes", "Table", "read_table", "tables", "user_table"]

BUILT_IN = Path(__file__).with_name("speed.json")

Range = tuple[int | None, int | None]
Table = dict[str, dict[str, dict[str, list[int | None]]]]
"""[least, most] elements at which the native kernel is taken, None for no limit: by op, instruction set and dtype."""


def user_table() -> Path:
    """Return the path where `llmkern tune` keeps this user's table."""
    return Path(settings.cache).expanduser() / "cpu" / "speed.json"


def read_table(path: Path) -> Table:
    """Read the table from this file; it is empty if there is no file."""
    found: Table = json.loads(path.read_text()) if path.is_file() else {}
    return found


@functools.cache
def tables() -> tuple[Table, ...]:
    """The user's table and the built-in one."""
    return read_table(user_table()), read_table(BUILT_IN)


@constant_result
def _taken(name: str, dtype: str) -> Range:
    """The sizes at which the native kernel is taken on the instruction set in use."""
    isas = _native.CPU_ISAS[: _native.CPU_ISAS.index(_native.cpu_isa() or "portable") + 1]
    for isa in reversed(isas):
        for table in tables():
            if isa in table.get(name, {}):
                least, most = table[name][isa].get(dtype, (None, None))
                return least, most
    return None, None


@dataclass(frozen=True)
class MeasuredSizes:
    """An implementation's `slower`, by the number of elements of argument `tensor`.

    variant: an argument whose value, after a dash, is part of the table's name; variants: its values.
    """

    op: str
    tensor: str
    variant: str | None = None
    variants: tuple[str, ...] = ()

    def name(self, value: str | None) -> str:
        """The table's name of the op with this value of the variant."""
        return self.op if value is None else f"{self.op}-{value}"

    def __call__(self, **call: Any) -> str | None:
        x: Tensor = call[self.tensor]
        name = self.name(None if self.variant is None else call[self.variant])
        least, most = _taken(name, str(x.dtype).removeprefix("torch."))
        size = x.numel()
        if least is not None and known(size < least):
            return f"{self.tensor} has {size} elements; at least {least} are taken: with fewer, PyTorch is faster"
        if most is not None and known(size > most):
            return f"{self.tensor} has {size} elements; at most {most} are taken: with more, PyTorch is faster"
        return None
