"""Check that objects are unchanged: one pass over all of them at each call, by identity and in C."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter, contains, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Snapshot"]

_DTYPE = attrgetter("dtype")


class Snapshot:
    """Contents of dictionaries, classes of modules, and addresses and dtypes of tensors at one moment."""

    def __init__(self) -> None:
        self._known: set[tuple[int, Any]] = set()
        self._held: tuple[list[Mapping[Any, Any]], list[Any], list[Any]] = [], [], []
        self._absent: tuple[list[Mapping[Any, Any]], list[Any]] = [], []
        self._whole: tuple[list[dict[Any, Any]], list[dict[Any, Any]]] = [], []
        self._modules: list[nn.Module] = []
        self._classes: list[type] = []
        self._empty: list[Mapping[Any, Any]] = []
        self._attributes: list[tuple[Any, str, Any]] = []
        self._places: list[tuple[Tensor, tuple[Any, ...]]] = []
        self._tensors: list[Tensor] = []
        self._dtypes: list[torch.dtype] = []

    def entry(self, held: Mapping[Any, Any], name: Any) -> None:
        """Require that `held[name]` stays the same object, or stays absent."""
        if (id(held), name) in self._known:
            return
        self._known.add((id(held), name))
        if name in held:
            for column, value in zip(self._held, (held, name, held[name]), strict=True):
                column.append(value)
        else:
            self._absent[0].append(held)
            self._absent[1].append(name)

    def entries(self, held: dict[Any, Any]) -> None:
        """Require that `held` keeps the same keys with the same objects."""
        if any(isinstance(value, Tensor) and value.numel() == 1 for value in held.values()):
            # Two tensors of one element can be compared, and are then told apart by their values alone.
            for name in held:
                self.entry(held, name)
        self._whole[0].append(held)
        self._whole[1].append(dict(held))

    def attribute(self, holder: Any, name: str) -> None:
        """Require that `holder.name` stays the same object, for attributes that are in no dictionary."""
        if (id(holder), name) not in self._known:
            self._known.add((id(holder), name))
            self._attributes.append((holder, name, getattr(holder, name, None)))

    def module(self, module: nn.Module) -> None:
        """Require that the module keeps its class, and that calling it runs that class's forward and no hooks."""
        self._modules.append(module)
        self._classes.append(type(module))
        for name in ("forward", "_compiled_call_impl"):
            self.entry(vars(module), name)

    def empty(self, held: Mapping[Any, Any]) -> None:
        """Require that `held` stays empty."""
        self._empty.append(held)

    def storage(self, tensor: Tensor) -> None:
        """Require that the tensor's data stay at the same address with the same layout."""
        self._places.append((tensor, _place(tensor)))

    def dtypes(self, tensors: Iterable[Tensor | None]) -> None:
        """Require that the tensors keep their dtypes, which `weight.data = …` may change; checked by `dtypes_hold`."""
        given = [tensor for tensor in tensors if tensor is not None]
        self._tensors += given
        self._dtypes += map(_DTYPE, given)

    def holds(self) -> bool:
        """Return True if nothing has changed."""
        held, names, values = self._held
        try:
            return (
                all(map(is_, map(getitem, held, names), values))
                and not any(map(contains, *self._absent))
                and (not self._modules or self._modules_hold())
            )
        except (KeyError, RuntimeError):  # an entry is gone, or two tensors are not one
            return False

    def dtypes_hold(self) -> bool:
        """Return True if the tensors still have their dtypes.  Separate from `holds`: after matrix products have
        emptied the caches, reading hundreds of tensors takes long.
        """
        return list(map(_DTYPE, self._tensors)) == self._dtypes

    def _modules_hold(self) -> bool:
        return (
            list(map(type, self._modules)) == self._classes
            and self._whole[0] == self._whole[1]
            and not any(self._empty)
            and all([getattr(holder, name, None) is value for holder, name, value in self._attributes])
            and all([_place(tensor) == place for tensor, place in self._places])
        )


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
