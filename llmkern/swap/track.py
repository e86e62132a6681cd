"""Track where each element of a tensor comes from, by moving element identities along with the tensor's own.

A value of a program has one identity for each element.  A view, a transposition, a split or a concatenation is done to
the identities as it is done to the numbers, so that whatever a forward does to move heads about, the identities say
where each element has ended up; nothing is known of the moves themselves.  Products with numbers are kept beside them.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmkern.programs.program import Option, Place

__all__ = ["Arranged", "Node", "Refused", "Term", "Value", "Values", "columns_text", "in_heads", "uniform"]


class Refused(Exception):
    """The forward does something that no program expresses; the message is the reason."""


@dataclass(eq=False)
class Node:
    """A step under construction.  results: its values, including those made by part of a packed linear layer."""

    op: str
    values: list[Value]
    places: list[Place] = field(default_factory=list)
    options: dict[str, Option | Value] = field(default_factory=dict)
    results: list[Value] = field(default_factory=list)


@dataclass(eq=False)
class Value:
    """One value of a program: an input, a parameter, or what a step makes.

    first: the identity of its first element.  shape: [B, S, columns] of rows; of other things whatever they have.
    kind: "rows", "table" (cosines, sines), "mask", "bias", "parameter", "terms", "scores", "weights", "whole", or a
        router's "routed" (weights of experts) and "chosen" (their numbers).
    name: of an input, or the place of a parameter.
    """

    first: int
    shape: tuple[int, ...]
    kind: str
    node: Node | None = None
    name: str = ""
    rows: tuple[int, int, int] | None = None  # of the linear layer that makes it
    terms: tuple[Term, ...] = ()
    about: Any = None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def identities(self) -> Tensor:
        return torch.arange(self.first, self.first + self.numel).view(self.shape)


@dataclass(frozen=True, eq=False)
class Arranged:
    """Contents of a tensor: the identity of each element, and the factor it was multiplied by."""

    identities: Tensor
    factor: float | Tensor = 1.0


@dataclass(frozen=True, eq=False)
class Term:
    """One product in a sum: elements of rows times elements of a table."""

    rows: Arranged
    table: Arranged


class Values:
    """All values of one forward, and which of them each tensor holds."""

    def __init__(self) -> None:
        self.all: list[Value] = []
        self._firsts: list[int] = []
        self._next = 1
        self._held: dict[int, tuple[Tensor, Arranged]] = {}
        self._parts: dict[tuple[int, tuple[int, int, int]], Value] = {}

    def new(self, shape: Any, kind: str, **fields: Any) -> Value:
        value = Value(self._next, tuple(shape), kind, **fields)
        self._next += value.numel
        self.all.append(value)
        self._firsts.append(value.first)
        return value

    def hold(self, tensor: Tensor, arranged: Arranged | Value) -> None:
        """Record what the tensor holds; a value is stored in its own order, in the tensor's shape."""
        if isinstance(arranged, Value):
            arranged = Arranged(arranged.identities().reshape(tensor.shape))
        self._held[id(tensor)] = tensor, arranged

    def held(self, tensor: Any) -> Arranged | None:
        found = self._held.get(id(tensor))
        return None if found is None else found[1]

    def let_go_of(self, written: Tensor) -> None:
        """Forget the contents of other tensors that share memory with one that is written."""
        address = written.untyped_storage().data_ptr()
        for key, (tensor, _) in list(self._held.items()):
            if tensor.untyped_storage().data_ptr() == address:
                del self._held[key]

    def shares_given(self, written: Tensor) -> bool:
        """Return True if the tensor shares memory with an input or a parameter."""
        address = written.untyped_storage().data_ptr()
        return any(
            tensor.untyped_storage().data_ptr() == address and self.of(int(arranged.identities.min())).node is None
            for tensor, arranged in self._held.values()
            if arranged.identities.numel()
        )

    def of(self, identity: int) -> Value:
        return self.all[bisect_right(self._firsts, identity) - 1]

    def within(self, arranged: Arranged) -> Value | None:
        """Return the value that all elements belong to, or None if they belong to several."""
        low, high = int(arranged.identities.min()), int(arranged.identities.max())
        value = self.of(low)
        return value if high < value.first + value.numel else None

    def whole(self, arranged: Arranged, kind: str) -> Value | None:
        """Return the value of this kind that the tensor holds unchanged, up to dimensions of size 1 and repetition."""
        value = self.within(arranged)
        if value is None or value.kind != kind or not _is_one(arranged.factor):
            return None
        seen = arranged.identities
        for dim, size in enumerate(seen.shape):  # what is repeated counts once
            if size > 1 and bool((seen.select(dim, 0).unsqueeze(dim) == seen).all()):
                seen = seen.narrow(dim, 0, 1)
        return value if torch.equal(seen.flatten(), value.identities().flatten()) else None

    def rows(self, arranged: Arranged, what: str) -> tuple[Value, Tensor]:
        """Return the value whose rows the tensor holds, each row once, and each element's place within it.

        Some columns of a packed projection are a value of their own.  Raises `Refused` where it is otherwise."""
        value = self.within(arranged)
        if value is None or value.kind != "rows":
            raise Refused(f"{what} takes what is no one value")
        places = arranged.identities - value.first
        count = value.shape[-1]
        columns = torch.unique(places % count)
        tokens = value.numel // count
        if places.numel() != tokens * columns.numel() or torch.unique(places).numel() != places.numel():
            raise Refused(f"{what} takes some tokens, or repeats them")
        if columns.numel() == count:
            return value, places
        among = torch.searchsorted(columns, (places % count).contiguous())
        return self.part(value, columns), places // count * columns.numel() + among

    def part(self, value: Value, columns: Tensor) -> Value:
        """Return some columns of a value, in their order: of a linear layer's results, or of what was made from them
        elementwise.
        """
        node = value.node
        rows = _runs(columns.tolist(), value.shape[-1])
        if node is None or value.rows is not None or rows is None:
            raise Refused(f"it takes {columns_text(columns.tolist())} of a value's columns")
        known = self._parts.get((value.first, rows))
        if known is not None:
            return known
        shape = (*value.shape[:-1], columns.numel())
        if node.op == "linear":
            part = self.new(shape, "rows", node=node, rows=rows)
            node.results.append(part)
        elif len(node.values) == 1 and not node.places and node.op not in ("rope", "append", "attention"):
            made = Node(node.op, [self.part(node.values[0], columns)], options=node.options)
            part = self.new(shape, "rows", node=made)
            made.results.append(part)
        else:
            raise Refused(f"it takes {columns_text(columns.tolist())} of a value's columns")
        self._parts[value.first, rows] = part
        return part


def _runs(columns: list[int], count: int) -> tuple[int, int, int] | None:
    """Return (begin, end, period) of columns that recur, with period 0 for one run; None if they do not."""
    begin, length = columns[0], 1
    while length < len(columns) and columns[length] == begin + length:
        length += 1
    if length == len(columns):
        return begin, begin + length, 0
    period = columns[length] - begin
    expected = [start + i for start in range(begin, count, period) for i in range(length)]
    return (begin, begin + length, period) if count % period == 0 and expected == columns else None


def columns_text(columns: list[int]) -> str:
    return f"{len(columns)} from {columns[0]} to {columns[-1]}"


def _is_one(factor: float | Tensor) -> bool:
    return bool((factor == 1).all()) if isinstance(factor, Tensor) else factor == 1


def uniform(factor: float | Tensor) -> float:
    """Return the factor shared by every element; raises `Refused` if there are several."""
    if not isinstance(factor, Tensor):
        return factor
    first = float(factor.flatten()[0])
    if not bool((factor == first).all()):
        raise Refused("between its parts its forward computes neg of some columns")
    return first


def in_heads(value: Value, shape: Any) -> Arranged:
    """Reshape rows [B, S, heads * D] to [B, heads, S, D]."""
    return Arranged(value.identities().unflatten(-1, (shape[1], shape[3])).transpose(1, 2))
