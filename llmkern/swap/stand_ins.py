"""Stand-ins for a layer's weights, so that a layer of any size is read in milliseconds.

A linear layer has the sizes of the real one, and a product of low rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from llmkern.programs.run import Call, reference
from llmkern.swap.derive import as_before
from llmkern.swap.guard import Part, Read, merged
from llmkern.swap.match import linear_like
from llmkern.swap.packed_experts import layout_of
from llmkern.swap.rules import norms as norms_rule

__all__ = ["LinearSizes", "Norm", "StandIns", "is_linear", "linear_sizes", "norm_of"]

Found = TypeVar("Found")

_RANK = 3


class StandIns:
    """Random parameters in place of a layer's own, the same ones for its forward and for its program's executor.

    dtype: of all of them.  spread: standard deviation of what linear layers give.
    known: what parts were found to be in other runs, to be filled."""

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, spread: float, known: dict[Any, Any] | None = None
    ) -> None:
        self.module, self.dtype, self.spread = module, dtype, spread
        self._known = {} if known is None else known
        self.generator = torch.Generator().manual_seed(0)
        self.parts: tuple[Part, ...] = ()  # what norms and activations take for granted
        self._linears: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        self._factors: dict[str, Tensor] = {}  # of experts: each has the same product times a number of its own
        self._norms: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self._tensors: dict[str, Tensor] = {}

    def once(self, find: Callable[[nn.Module], Found], path: str, part: nn.Module) -> Found:
        """Return `find(part)`, or its result in another run of the same layer."""
        if (find, path) not in self._known:
            self._known[find, path] = find(part)
        found: Found = self._known[find, path]
        return found

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def linear(self, path: str, x: Tensor, call: Call = reference) -> Tensor:
        """Implement `Weights.linear` (llmkern/programs/run.py) by a product of rank 3."""
        if path not in self._linears:
            sizes = linear_sizes(self.module, path)
            into = self.randn(sizes.columns, _RANK) * (sizes.columns**-0.5 * self.spread)
            bias = self.randn(sizes.rows) * self.spread if sizes.bias else None
            self._linears[path] = into, self.randn(_RANK, sizes.rows), bias
        into, onto, bias = [None if t is None else t.to(x.dtype) for t in self._linears[path]]
        assert into is not None
        assert onto is not None
        y = x @ into @ onto
        return y if bias is None else y + bias

    def expert(self, path: str, number: int, x: Tensor, call: Call) -> Tensor:
        """Implement `Experts.expert` (llmkern/programs/run.py)."""
        if path not in self._factors:
            self._factors[path] = self.randn(linear_sizes(self.module, path).experts)
        return self.linear(path, x) * self._factors[path][number]

    def norm(self, path: str) -> tuple[Tensor | None, Tensor | None]:
        if path not in self._norms:
            layer = self.module.get_submodule(path)
            norm = norm_of(as_before(layer))
            assert norm is not None
            held = [None if name is None else layer._parameters[name] for name in (norm.weight, norm.bias)]
            self._norms[path] = tuple([None if p is None else self.randn(*p.shape) for p in held])  # type: ignore[assignment]
        return self._norms[path]

    def tensor(self, path: str) -> Tensor:
        if path not in self._tensors:
            owner, _, name = path.rpartition(".")
            held: Any = getattr(self.module.get_submodule(owner), name)
            self._tensors[path] = self.randn(*held.shape)
        return self._tensors[path]


class LinearSizes(NamedTuple):
    """Sizes of a linear layer.  turned: its weight is the transpose of another.  experts: how many have one each, or
    0."""

    rows: int
    columns: int
    bias: bool
    turned: bool = False
    experts: int = 0


def linear_sizes(module: nn.Module, path: str) -> LinearSizes:
    """Return the sizes of the linear layer at a path: nn.Linear and modules like it, transformers' Conv1D, a router,
    `in_proj` of a torch.nn.MultiheadAttention, or a weight of packed experts.
    """
    owner, _, name = path.rpartition(".")
    holder: Any = module.get_submodule(owner)
    if name == "in_proj" and isinstance(holder, nn.MultiheadAttention):
        return LinearSizes(3 * holder.embed_dim, holder.embed_dim, holder.in_proj_bias is not None)
    if name in holder._parameters and (layout := layout_of(holder)) is not None:
        rows, columns = layout.sizes(name)
        return LinearSizes(rows, columns, layout.bias is not None, layout.turned, layout.experts)
    layer: Any = module.get_submodule(path)
    has_bias = getattr(layer, "bias", None) is not None
    if linear_like(layer):
        return LinearSizes(layer.out_features, layer.in_features, has_bias)
    if hasattr(layer, "nf"):
        return LinearSizes(layer.nf, layer.nx, has_bias, turned=True)
    rows, columns = layer.weight.shape
    return LinearSizes(rows, columns, has_bias)


def is_linear(module: nn.Module) -> bool:
    """Recognize nn.Linear, modules like it, and transformers' Conv1D."""
    weight = module._parameters.get("weight")
    conv1d = type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)
    return linear_like(module) or (conv1d and weight is not None and weight.dim() == 2)


class Norm(NamedTuple):
    """A norm: its op, the names of its parameters, its numbers, and its guarded attributes."""

    op: str
    weight: str | None
    bias: str | None
    eps: float
    offset: float
    parts: tuple[Part, ...]


def norm_of(module: nn.Module) -> Norm | None:
    """Return the norm that a module computes, or None."""
    found: Any = norms_rule.find(module)
    if found is None or not found.op or found.reason:
        return None
    weight, bias, source, offset = found.cls._llmkern_norm
    eps = norms_rule.eps_of(module, source, torch.empty(0))
    parts = found.cls._llmkern_guard.parts
    if isinstance(source, str):  # a norm of its own reads it at each call
        parts = merged((*parts, Part((), type(module), (Read("", source, getattr(module, source)),))))
    return Norm(found.op, weight, bias, eps, offset, parts)
