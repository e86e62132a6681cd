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
    """name: as schemes call it.

    pack: a floating-point weight [rows, columns] to the tensors that kernels read and checkpoints hold, by their names
        in a module's state dict.
    unpack: those tensors to the weight that they stand for, [rows, columns] fp32; the definition of the format.
    modules: the classes of modules whose weight is in it.
    group: what a compressed-tensors config says of such a module: a config group without its targets.
    refuse: why a config group of a checkpoint is not in this format, or None.
    empty: given a path, a floating-point module and a config group, the module without values in its place, on the
        meta device.  Raises ValueError where there is none.
    """

    name: str
    pack: Callable[[Tensor], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor]], Tensor]
    modules: tuple[type[nn.Module], ...]
    group: Callable[[Any], dict[str, Any]]
    refuse: Callable[[Mapping[str, Any]], str | None]
    empty: Callable[[str, nn.Module, Mapping[str, Any]], nn.Module]


def formats() -> list[Format]:
    """Every format, in alphabetical order."""
    return [module.FORMAT for module in import_children(__name__) if hasattr(module, "FORMAT")]


def format_of_module(module: nn.Module) -> Format | None:
    """The format that the module's weight is in; None where it is in floating point."""
    return next((each for each in formats() if isinstance(module, each.modules)), None)


def format_of_group(group: Mapping[str, Any]) -> Format:
    """The format of a checkpoint's config group.  Raises ValueError where llmkern reads no such format."""
    reasons: Iterable[str | None] = []
    for each in formats():
        reason = each.refuse(group)
        if reason is None:
            return each
        reasons = [*reasons, f"{each.name}: {reason}"]
    raise ValueError(f"llmkern reads none such ({'; '.join(str(reason) for reason in reasons)})")
