"""A call of `layers_` for any program: what it says of itself decides on the sizes of all tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmkern.programs.names import unique
from llmkern.programs.program import GATES, OPERATORS, Parameter, Place, Program, Step, parse
from llmkern.testing.case import Call, Make
from llmkern.testing.cases._layer import left_padding, linear

__all__ = ["call_of"]


class _Sizes(NamedTuple):
    """hidden, inner: columns of the layer, and of its activations.  heads, kv_heads: where no rows say how many.
    experts: how many there are."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    experts: int


def call_of(
    make: Make,
    text: str,
    queries: int,
    past: int = 0,
    *,
    batch: int = 2,
    layers: int = 1,
    hidden: int = 32,
    inner: int = 48,
    heads: tuple[int, int] = (4, 2),
    experts: int = 4,
    tokens: int = 5,
    kept: bool = False,
    cached: bool = True,
    masked: bool = False,
    turned: tuple[str, ...] = (),
    int8: bool = False,
    spare: int = 2,
) -> Call:
    """heads: of queries and of keys.  tokens: of the encoder; kept: a cache has their keys and values.

    cached: whether there are caches.  masked: padding on the left, and of the encoder's tokens on the right.
    turned: places of linear layers whose weights lie as [in, out].  int8: weights, where they are not turned.
    """
    program = unique(parse(text))
    past = past if cached and any([step.op == "append" for step in program.steps]) else 0
    periodic = any([place.rows and place.rows[2] for step in program.steps for place in step.places])
    sizes = _Sizes(hidden, inner, heads[0], heads[0] if periodic else heads[1], experts)
    rows, columns = _walk(program, sizes)
    found: list[Tensor | None] = []
    for _ in range(layers):
        for parameter in parse(text).parameters():
            found += _tensors(make, parameter, rows[parameter], turned, int8)
    caches: list[Tensor] = []
    for _ in range(layers if cached else 0):
        for op, length in (("append", past + queries + spare), ("keep", tokens)):
            caches += _buffers(make, program, columns, op, (batch, length), past + queries)
    keys, lengths = past + queries, [past + queries, *[max(past, 1)] * (batch - 1)]
    width = next((_whole(s, "rotary") or _whole(s, "dim") for s in program.steps if s.op == "rope"), 0)
    angles = make.randn(1, queries, width, dtype=torch.float32)
    encoder_mask = (make.tensor(range(tokens), torch.int64) < tokens - 1)[None, None, None]
    inputs: dict[str, Tensor | None] = {
        "cos": angles.cos().to(make.dtype),
        "sin": angles.sin().to(make.dtype),
        "mask": left_padding(make, queries, keys, tuple(lengths)) if masked else None,
        "bias": make.randn(1, heads[0], queries, keys),
        "alibi": make.randn(batch * heads[0], 1, keys),
        "encoder": None if kept else make.randn(batch, tokens, hidden),
        "encoder_mask": encoder_mask if masked else None,
    }
    return {
        "hidden": make.randn(batch, queries, hidden),
        "programs": [str(parse(text))],
        "parameters": found,
        "inputs": [inputs[name] for name in program.inputs[1:]],
        "caches": caches,
        "past": past,
        "schemes": "w8a8",
    }


def _walk(program: Program, sizes: _Sizes) -> tuple[dict[Parameter, tuple[int, ...]], dict[str, int]]:
    """Sizes of parameters, and columns of values."""
    wanted: dict[str, int] = {}
    for step in reversed(program.steps):
        if step.op == "attention":
            q, k, v, *_ = step.values
            dim = _whole(step, "dim")
            wanted |= {q: sizes.heads * dim, k: sizes.kv_heads * dim, v: sizes.kv_heads * dim}
        elif step.op != "linear":
            times = _whole(step, "repeat") or 1
            wanted |= {v: wanted[r] // times for v, r in zip(step.values, step.results, strict=False) if r in wanted}
    columns = dict.fromkeys(program.inputs, sizes.hidden)
    found: dict[Parameter, tuple[int, ...]] = {}
    for step in program.steps:
        x = columns[step.values[0]]
        made = [x] * len(step.results)
        if step.op == "linear":
            made = [_linear(step, place, wanted, sizes, x, found) for place in step.places]
        elif step.op == "route":
            made = [sizes.experts]
            found[Parameter("linear", step.places[0].path)] = (sizes.experts, x)
        elif step.op == "experts":
            *inner, down = step.places
            begin, end, period = inner[0].rows or (0, 0, 0)
            width = end - begin if end and not period else sizes.inner
            for place in inner:
                rows = width if place.rows is None else width * 2
                found[Parameter("linear", place.path)] = (sizes.experts, rows, x)
            found[Parameter("linear", down.path)] = (sizes.experts, x, width)
        elif step.op == "attention":
            dim = _whole(step, "dim")
            made = [x // dim * (columns[step.values[2]] // (columns[step.values[1]] // dim))]
        elif step.op in ("rope", "append", "keep"):
            times = _whole(step, "repeat") or 1
            made = [columns[v] * times for v in step.values[: len(step.results)]]
        elif OPERATORS[step.op].parameters == "norm":
            whole, path = step.places[0].tensor, step.places[0].path
            found[Parameter("tensor", path) if whole else Parameter("norm", path)] = (_whole(step, "dim") or x,)
        for name in ("by", "sinks", "slopes", "correction"):
            if isinstance(vector := step.option(name), Place):
                size = {"by": x, "correction": sizes.experts}.get(name) or x // _whole(step, "dim")
                found[Parameter("tensor", vector.path)] = (size,)
        columns.update(zip(step.results, made, strict=False))
    return found, columns


def _linear(
    step: Step,
    place: Place,
    wanted: dict[str, int],
    sizes: _Sizes,
    x: int,
    found: dict[Parameter, tuple[int, ...]],
) -> int:
    """What a place makes of x columns; its weight is as large as all that is taken of it needs."""
    activation = step.option("activation")
    number = 0 if activation in GATES else step.places.index(place)
    widens = activation is not None and step.option("residual") is None
    made = wanted.get(step.results[number]) or (sizes.inner if widens else sizes.hidden)
    rows = made
    if place.rows is not None:
        begin, end, period = place.rows
        made = made if period else end - begin
        rows = made // (end - begin) * period if period else end
    parameter = Parameter("linear", place.path)
    found[parameter] = (max(rows, found.get(parameter, (0,))[0]), x)
    return made


def _tensors(
    make: Make, parameter: Parameter, size: tuple[int, ...], turned: tuple[str, ...], int8: bool
) -> list[Tensor | None]:
    if parameter.kind != "linear":
        vectors = [make.randn(*size, scale=0.3, offset=1.0), make.randn(*size, scale=0.3)]
        return [*vectors[: 2 if parameter.kind == "norm" else 1]]
    *experts, rows, columns = size
    lies_turned = parameter.path in turned
    count = experts[0] if experts else 1
    found = [*linear(make, "", count * rows, columns, int8=int8 and not lies_turned, bias=True).values()]
    if experts:
        found = [None if t is None else t.unflatten(0, (count, rows)) for t in found]
    if lies_turned:
        found[0] = found[0].mT.contiguous().mT
    return found


def _buffers(
    make: Make, program: Program, columns: dict[str, int], op: str, size: tuple[int, int], end: int
) -> list[Tensor]:
    """Keys and values of a step; what lies beyond `end` of those that are appended is nobody's."""
    buffers = []
    for step in program.steps:
        if step.op != op:
            continue
        reader = next(s for s in program.steps if s.op == "attention" and s.values[1] == step.results[0])
        heads = columns[step.results[0]] // _whole(reader, "dim")
        for name in step.results:
            buffer = make.randn(size[0], heads, size[1], columns[name] // heads)
            if op == "append":
                buffer[:, :, end:] = 8.0
            buffers.append(buffer)
    return buffers


def _whole(step: Step, name: str) -> int:
    value = step.option(name, 0)
    assert isinstance(value, int)
    return value
