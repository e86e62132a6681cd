"""Undo in-place changes to a model if they fail half-way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Undo", "plainly", "undoing"]


class Undo:
    """Saved state: each module's class, children and tensors, and the values of the tensors passed to `save`."""

    def __init__(self, model: nn.Module) -> None:
        holders: list[tuple[Any, Any]] = [
            (holder, dict(holder))
            for module in model.modules()
            for holder in (module._modules, module._parameters, module._buffers)
        ]
        self._held = holders
        self._classes = [(module, type(module)) for module in model.modules()]
        self._values: list[tuple[Tensor, Tensor]] = []

    def save(self, tensor: Tensor) -> None:
        """Remember the values of a tensor that is about to be written."""
        self._values.append((tensor, tensor.detach().clone()))

    def undo(self) -> None:
        """Restore every module and tensor to its place, and the values of every saved tensor, bit for bit."""
        for holder, content in self._held:
            holder.clear()
            holder.update(content)
        for module, cls in self._classes:
            module.__class__ = cls
        with torch.no_grad():
            for tensor, value in reversed(self._values):
                tensor.copy_(value)


@contextlib.contextmanager
def undoing(model: nn.Module) -> Iterator[Undo]:
    """Within the block the module tree and saved tensors may change; an exception takes all of it back."""
    undo = Undo(model)
    try:
        yield undo
    except BaseException:
        undo.undo()
        raise


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Within the block tensors are made and computed as if the caller had set no mode: what `torch.inference_mode`
    makes could never be trained, and autocast would choose another dtype than the model's."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
