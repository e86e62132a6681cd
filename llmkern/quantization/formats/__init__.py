"""Formats of packed weights, a file each: how a weight is packed, what the pack means, how it is found in a checkpoint.

A module `<format>.py` of this folder holds `FORMAT`; nothing else has to know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llmkern.discovery import import_children

__all__ = ["Format", "format_of_group", "format_of_module", "formats"]


@dataclass(frozen=True)
class Format:
    """name: as compressed-tensors calls it, or we do.

    refuse: why a config group of a checkpoint is not in this format, or None.
    empty: given a path, a floating-point module and a config group, the module without values in its place, on the
        meta device, which a loader fills.  Raises ValueError where there is none.
    Of formats that are written too:
    takes: whether a module's weight is written in it.
    group: what a compressed-tensors config says of such a module: a config group without its targets.  Raises
        ValueError for a module that cannot be written.
    pack: a floating-point weight [rows, columns] to the tensors that checkpoints hold, by their names.
    unpack: those tensors to the weight that they stand for, [rows, columns] fp32; the definition of the format.
    write: a module's tensors as checkpoints hold them; None if its state dict has them so.
    """

    name: str
    refuse: Callable[[Mapping[str, Any]], str | None]
    empty: Callable[[str, nn.Module, Mapping[str, Any]], nn.Module]
    takes: Callable[[nn.Module], bool] | None = None
    group: Callable[[Any], dict[str, Any]] | None = None
    pack: Callable[[Tensor], dict[str, Tensor]] | None = None
    unpack: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    write: Callable[[Any], dict[str, Tensor]] | None = None


def formats() -> list[Format]:
    """Every format, in alphabetical order."""
    return [module.FORMAT for module in import_children(__name__) if hasattr(module, "FORMAT")]


def format_of_module(module: nn.Module) -> Format | None:
    """Return the format of the module's weight, or None for floating point."""
    return next((each for each in formats() if each.takes is not None and each.takes(module)), None)


def format_of_group(group: Mapping[str, Any]) -> Format:
    """The format of a checkpoint's config group.  Raises ValueError where llmkern reads no such format."""
    reasons: Iterable[str | None] = []
    for each in formats():
        reason = each.refuse(group)
        if reason is None:
            return each
        reasons = [*reasons, f"{each.name}: {reason}"]
    raise ValueError(f"llmkern reads none such ({'; '.join(str(reason) for reason in reasons)})")
