"""Infer the sizes of every value in a layer's program, and check parameters against them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmkern.checks import (
    check_dtype,
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
    given,
    shape_text,
)
from llmkern.ops._layer_packed import packed_behind
from llmkern.packed import PackedWeight
from llmkern.programs.program import GATES, Place, Program, Step

__all__ = ["TENSORS", "Needs", "needs_of", "rows_inputs"]

TENSORS = {"linear": 3, "norm": 2, "tensor": 1}
"""Number of tensors per parameter, by kind."""
_OP = "layers_"


@dataclass(frozen=True)
class Needs:
    """Requirements of one layer on a call.

    inputs: how many there are behind hidden.  linears: how many linear layers the program mentions.
    angles: by place among the inputs, the name and the columns that turn.
    masks: by place, the name, the query heads, and the keys: those of hidden's tokens, of the past too, or a number.
    biases: the same of what is added to scores.
    cache: columns of keys and values, and heads, of what joins the cache; None where nothing does.
    kept: columns of keys and values, tokens, and heads, of what is kept of other tokens; None where nothing is.
    """

    inputs: int
    linears: int
    angles: tuple[tuple[int, str, int], ...]
    masks: tuple[tuple[int, str, int, str | int], ...]
    biases: tuple[tuple[int, str, int, str | int], ...]
    cache: tuple[int, int, int] | None
    kept: tuple[int, int, int, int] | None


def rows_inputs(program: Program, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Inputs whose columns determine the sizes of results: all but angles and masks."""
    others = {
        name
        for step in program.steps
        for name in (step.values[-2:] if step.op == "rope" else [*step.reads()][3:] if step.op == "attention" else ())
    }
    named = zip(program.inputs[1:], inputs, strict=False)
    return [tensor for name, tensor in named if tensor is not None and name not in others and tensor.dim() > 0]


def needs_of(
    program: Program,
    parameters: Sequence[Tensor | None],
    hidden: Tensor,
    inputs: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    layer: int | None,
) -> Needs:
    """Check a layer's parameters and return what it needs.

    kept: of its caches, or of one that is like it.  layer: its number, for sentences; None for the only one."""
    return _Walk(program, parameters, hidden, inputs, kept, "" if layer is None else f" (layer {layer})").needs()


@dataclass
class _Walk:
    """One pass through a program; tracks each value's columns, and the input whose tokens are its rows."""

    program: Program
    parameters: Sequence[Tensor | None]
    hidden: Tensor
    inputs: Sequence[Tensor | None]
    held: Sequence[Tensor]
    where: str
    columns: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    cached: dict[str, str] = field(default_factory=dict)
    angles: dict[int, tuple[int, str, int]] = field(default_factory=dict)
    masks: list[tuple[int, str, int, str | int]] = field(default_factory=list)
    biases: list[tuple[int, str, int, str | int]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    cache: list[int] | None = None
    kept: list[int] | None = None

    def needs(self) -> Needs:
        program = self.program
        if len(self.inputs) + 1 != len(program.inputs):
            raise self.wrong(
                f"inputs has {len(self.inputs)} elements, expected {len(program.inputs) - 1}: "
                f"{', '.join(program.inputs[1:])}"
            )
        self.first: dict[tuple[str, str], int] = {}
        count = linears = 0
        for parameter in program.parameters():
            self.first[parameter.kind, parameter.path] = count
            count += TENSORS[parameter.kind]
            linears += parameter.kind == "linear"
        self.columns[program.inputs[0]], self.tokens[program.inputs[0]] = self.hidden.shape[-1], ""
        for step in program.steps:
            checks: dict[str, Callable[[Step], Any]] = {
                "rms_norm": self.norm,
                "layer_norm": self.norm,
                "add_rms_norm": self.norm,
                "add_layer_norm": self.norm,
                "linear": self.linear,
                "route": self.route,
                "experts": self.experts,
                "rope": self.rope,
                "append": self.append,
                "keep": self.keep,
                "attention": self.attention,
            }
            if (absent := self.absence(step)) is not None:
                self.absent |= dict.fromkeys(step.results, absent)
            else:
                checks.get(step.op, self.elementwise)(step)
        result = program.result
        if self.columns.get(result) != self.hidden.shape[-1] or self.tokens[result] != "":
            raise self.wrong(f"the program returns {result}, expected rows like hidden's")
        cache = None if self.cache is None else (self.cache[0], self.cache[1], self.cache[2])
        kept = None if self.kept is None else (self.kept[0], self.kept[1], self.kept[2], self.kept[3])
        angles, masks, biases = tuple(self.angles.values()), tuple(self.masks), tuple(self.biases)
        return Needs(len(self.inputs), linears, angles, masks, biases, cache, kept)

    def absence(self, step: Step) -> str | None:
        """Return the absent input from which everything that the step reads is made; `keep` can do without it."""
        first = step.values[0]
        if step.op == "keep" or len([*step.reads()]) > 1:
            return None
        given = first not in self.program.inputs[1:] or first in self.columns or self.input(first)[1] is not None
        return self.absent.get(first) if given else first

    def wrong(self, what: str) -> ValueError:
        return ValueError(f"{_OP}: {what}{self.where}")

    def rows(self, name: str) -> int:
        """Return the columns of a value that is read as rows."""
        if name in self.absent:
            raise self.wrong(f"{self.absent[name]} is not given, but the program reads {name} as rows")
        if name not in self.columns:
            tensor = self.input(name)[1] if name in self.program.inputs else None
            if tensor is None:
                raise self.wrong(f"{name} is not given, but the program reads it as rows")
            check_same_dtype(_OP, "hidden", self.hidden, **{name: tensor})
            check_same_device(_OP, "hidden", self.hidden, **{name: tensor})
            if tensor.dim() != 3 or tensor.shape[0] != self.hidden.shape[0]:
                expected = f"expected [{self.hidden.shape[0]}, tokens, columns]"
                raise self.wrong(f"{name} has shape {shape_text(tensor.shape)}, {expected}")
            self.columns[name], self.tokens[name] = tensor.shape[-1], name
        return self.columns[name]

    def input(self, name: str) -> tuple[int, Tensor | None]:
        """Return an input's index in the call, and its tensor."""
        if name not in self.program.inputs[1:]:
            raise self.wrong(f"{name} is no input of the program, as angles and masks have to be")
        place = self.program.inputs.index(name) - 1
        return place, self.inputs[place]

    def make(self, names: Sequence[str], columns: Sequence[int], tokens: str) -> None:
        for name, count in zip(names, columns, strict=True):
            self.columns[name], self.tokens[name] = count, tokens
            self.cached.pop(name, None)
            self.absent.pop(name, None)

    def tensors(self, kind: str, path: str) -> list[Tensor | None]:
        """Return the tensors of one parameter; a module's place may also be an `@path`."""
        first = self.first[kind, path]
        return list(self.parameters[first : first + TENSORS[kind]])

    def heads(self, name: str, dim: int) -> int:
        if dim < 1 or self.rows(name) % dim:
            raise self.wrong(f"{name} has {self.rows(name)} columns, expected a multiple of dim {dim}")
        return self.rows(name) // dim

    def vector(self, place: Place, size: int, why: str) -> None:
        """Check a floating-point tensor with this many elements, which must be present."""
        (tensor,) = self.tensors("tensor", place.path)
        if tensor is None:
            raise TypeError(f"{_OP}: {place} is None, expected a Tensor")
        check_floating(_OP, **{str(place): tensor})
        check_shape(_OP, str(place), tensor, (size,), why)
        check_same_device(_OP, "hidden", self.hidden, **{str(place): tensor})

    def norm(self, step: Step) -> None:
        x = step.values[0]
        place, dim = step.places[0], _whole(step, "dim") or self.rows(x)
        self.heads(x, dim)
        tensors = self.tensors("tensor" if place.tensor else "norm", place.path)
        named = given(**dict(zip(("weight", "bias"), tensors, strict=False)))
        for part, tensor in named.items():
            check_floating(_OP, **{f"{place}: {part}": tensor})
            check_shape(_OP, f"{place}: {part}", tensor, (dim,), f"the columns of {x}")
            check_same_device(_OP, "hidden", self.hidden, **{f"{place}: {part}": tensor})
        for other in step.values[1:]:
            self.same_rows(x, other, step)
        self.make(step.results, [self.rows(x)] * len(step.results), self.tokens[x])

    def same_rows(self, a: str, b: str, step: Step) -> None:
        if self.rows(a) != self.rows(b) or self.tokens[a] != self.tokens[b]:
            raise self.wrong(f"{a} and {b} have different shapes in {', '.join(step.results)} = {step.call()}")

    def linear(self, step: Step) -> None:
        x = step.values[0]
        made = [self.weight(place, self.rows(x)) for place in step.places]
        if step.option("activation") in GATES:
            if made[0] != made[1]:
                raise self.wrong(f"{step.places[0]} and {step.places[1]} make {made[0]} and {made[1]} columns")
            made = made[:1]
        residual = step.option("residual")
        if isinstance(residual, str) and (self.rows(residual) != made[0] or self.tokens[residual] != self.tokens[x]):
            expected = f"expected {self.rows(residual)}, the columns of {residual}"
            raise self.wrong(f"{step.places[0]}: weight has {made[0]} rows, {expected}")
        self.make(step.results, made, self.tokens[x])

    def route(self, step: Step) -> None:
        count = self.weight(step.places[0], self.rows(step.values[0]))
        groups, most = step.option("groups"), count
        if isinstance(groups, int):
            size = 0 if groups == 0 or count % groups else count // groups
            if size < 2 or not 1 <= _whole(step, "group_top") <= groups:
                said = f"route: {step.option('group_top')} of {groups} groups of {count} experts"
                raise self.wrong(f"{said}, expected groups of as many, at least 2")
            most = size * _whole(step, "group_top")
        if not 1 <= _whole(step, "top") <= most:
            where = f"the rows of {step.places[0]}" if groups is None else "the experts of group_top groups"
            raise self.wrong(f"route: top is {step.option('top')}, expected 1 to {most}, {where}")
        correction = step.option("correction")
        if isinstance(correction, Place):
            self.vector(correction, count, "one for each expert")
        self.make(step.results, [count], self.tokens[step.values[0]])

    def experts(self, step: Step) -> None:
        x, weights = step.values
        count = self.rows(weights)
        if self.tokens[x] != self.tokens[weights]:
            raise self.wrong(f"{x} and {weights} are of different tokens")
        *inner, down = step.places
        made = [self.weight(place, self.rows(x), count) for place in inner]
        if len({*made}) > 1:
            raise self.wrong(f"{inner[0]} and {inner[1]} make {made[0]} and {made[1]} columns")
        self.make(step.results, [self.weight(down, made[0], count)], self.tokens[x])

    def weight(self, place: Place, columns: int, experts: int | None = None) -> int:
        """Return the number of rows that a place takes from a weight with this many columns; per expert, given the
        experts.
        """
        if place.tensor:
            raise self.wrong(f"{place} is one tensor, expected a linear layer")
        weight, scale, bias = self.tensors("linear", place.path)
        if weight is None:
            raise self.wrong(f"{place.path}: weight is None, expected a Tensor")
        packed = packed_behind(weight)
        if packed is not None:
            return self.packed(place, packed, columns, scale, bias)
        if experts is not None:
            for part, tensor in (("weight", weight), ("scale", scale), ("bias", bias)):
                if tensor is not None and (tensor.dim() == 0 or tensor.shape[0] != experts):
                    shape = f"{part} has shape {shape_text(tensor.shape)}"
                    raise self.wrong(f"{place.path}: {shape}, expected {experts} experts")
            if experts == 0:
                raise self.wrong(f"{place.path}: weight has no experts")
            weight, scale, bias = [None if t is None else t[0] for t in (weight, scale, bias)]
            assert weight is not None
        if weight.dim() != 2 or weight.shape[1] != columns:
            raise self.wrong(f"{place.path}: weight has shape {shape_text(weight.shape)}, expected [N, {columns}]")
        rows = weight.shape[0]
        if scale is None:
            check_floating(_OP, **{f"{place.path}: weight": weight})
            check_same_dtype(_OP, "hidden", self.hidden, **{f"{place.path}: weight": weight})
        else:
            check_dtype(_OP, f"{place.path}: weight", weight, torch.int8)
            check_dtype(_OP, f"{place.path}: scale", scale, torch.float32)
            check_shape(_OP, f"{place.path}: scale", scale, (rows, 1), "one per row of the weight")
        check_floating(_OP, **given(**{f"{place.path}: bias": bias}))
        check_shape(_OP, f"{place.path}: bias", bias, (rows,), "one per row of the weight")
        for part, tensor in (("weight", weight), ("scale", scale), ("bias", bias)):
            check_same_device(_OP, "hidden", self.hidden, **{f"{place.path}: {part}": tensor})
        return self.taken(place, rows)

    def packed(
        self, place: Place, weight: PackedWeight, columns: int, scale: Tensor | None, bias: Tensor | None
    ) -> int:
        """Like `weight`, for a packed weight, which has its own scales."""
        if scale is not None:
            raise self.wrong(f"{place.path}: a packed weight has a scale besides its own")
        if weight.k != columns:
            raise self.wrong(f"{place.path}: weight has shape [{weight.n}, {weight.k}], expected [N, {columns}]")
        check_floating(_OP, **given(**{f"{place.path}: bias": bias}))
        check_shape(_OP, f"{place.path}: bias", bias, (weight.n,), "one per row of the weight")
        for part, tensor in (("weight", weight.codes), ("bias", bias)):
            check_same_device(_OP, "hidden", self.hidden, **{f"{place.path}: {part}": tensor})
        return self.taken(place, weight.n)

    def taken(self, place: Place, rows: int) -> int:
        """Return how many of a weight's rows a place takes."""
        if place.rows is None:
            return rows
        begin, end, period = place.rows
        if end > rows or (period and rows % period):
            raise self.wrong(f"{place}: weight has {rows} rows, which are not of that form")
        return (end - begin) * (rows // period if period else 1)

    def rope(self, step: Step) -> None:
        *values, cos, sin = step.values
        dim = _whole(step, "dim")
        turned = _whole(step, "rotary") or dim
        if turned > dim or turned % 2:
            raise self.wrong(f"rope: {turned} of dim {dim} columns turn, expected an even number of them")
        for x in values:
            self.heads(x, dim)
        for name in (cos, sin):
            place, _ = self.input(name)
            self.angles[place] = (place, name, turned)
        for x, result in zip(values, step.results, strict=True):
            self.make([result], [self.rows(x)], self.tokens[x])

    def append(self, step: Step) -> None:
        if self.cache is not None:
            raise self.wrong("the program appends twice")
        for name in step.values:
            if self.tokens.get(name, name) != "":
                raise self.wrong(f"{name} is of other tokens than hidden")
        times = _whole(step, "repeat") or 1
        self.cache = [*[self.rows(name) * times for name in step.values], 0]
        self.make(step.results, self.cache[:2], "")
        self.cached |= dict.fromkeys(step.results, "append")

    def keep(self, step: Step) -> None:
        if self.kept is not None:
            raise self.wrong("the program keeps twice")
        k, v = step.values
        absent = self.absent.get(k)
        if absent != self.absent.get(v):
            raise self.wrong(f"{k} and {v} are kept, but not made of the same input")
        if absent is None:
            columns = [self.rows(k), self.rows(v)]
            if self.tokens[k] != self.tokens[v]:
                raise self.wrong(f"{k} and {v} are kept, but not of the same tokens")
            tokens, count = self.tokens[k], self.count(self.tokens[k])
        elif not self.held or any([buffer.dim() != 4 for buffer in self.held]):
            raise self.wrong(f"{absent} is not given, and there is no cache of its keys and values")
        else:
            columns = [buffer.shape[1] * buffer.shape[3] for buffer in self.held]
            tokens, count = absent, self.held[0].shape[2]
        self.kept = [*columns, count, 0]
        self.make(step.results, columns, tokens)
        self.cached |= dict.fromkeys(step.results, "keep")

    def attention(self, step: Step) -> None:
        q, k, v, *masks = step.values
        dim = _whole(step, "dim")
        q_heads, kv_heads = self.heads(q, dim), self.heads(k, dim)
        if kv_heads == 0 or q_heads % kv_heads or self.rows(v) % kv_heads:
            raise self.wrong(
                f"attention: {q}, {k} and {v} have {self.rows(q)}, {self.rows(k)} and {self.rows(v)} columns, expected "
                f"heads of dim {dim}, those of {q} a multiple of those of {k} and {v}"
            )
        if step.option("window") == 0:
            raise self.wrong("attention: window is 0, expected the number of keys that a query sees, 1 or more")
        if self.tokens[k] != self.tokens[v] or self.cached.get(k) != self.cached.get(v) or self.tokens[q] != "":
            raise self.wrong(f"attention: {k} is of other tokens than {v}, or {q} than hidden")
        keys: str | int = "past" if self.cached.get(k) == "append" else self.count(self.tokens[k])
        if self.cached.get(k) == "keep" and self.kept is not None:
            keys, self.kept[3] = self.kept[2], kv_heads
        for mask in masks:
            self.masks.append((self.input(mask)[0], mask, q_heads, keys))
        if isinstance(bias := step.option("bias"), str):
            self.biases.append((self.input(bias)[0], bias, q_heads, keys))
            if step.option("slopes") is not None:
                raise self.wrong("attention: it has a bias and slopes, expected one of them")
        for option in ("sinks", "slopes"):
            at = step.option(option)
            if isinstance(at, Place):
                self.vector(at, q_heads, "one for each head")
        if self.cache is not None and self.cached.get(k) == "append":
            self.cache[2] = kv_heads
        self.make(step.results, [q_heads * (self.rows(v) // kv_heads)], self.tokens[q])

    def count(self, tokens: str) -> int:
        """Return the number of tokens of an input, or of hidden."""
        tensor = self.input(tokens)[1] if tokens else self.hidden
        return 0 if tensor is None else tensor.shape[1]

    def elementwise(self, step: Step) -> None:
        for other in step.values[1:]:
            self.same_rows(step.values[0], other, step)
        by = step.option("by")
        if isinstance(by, Place):
            self.vector(by, self.rows(step.values[0]), f"the columns of {step.values[0]}")
        self.make(step.results, [self.rows(step.values[0])], self.tokens[step.values[0]])


def _whole(step: Step, name: str) -> int:
    value = step.option(name, 0)
    assert isinstance(value, int)
    return value
