"""Layers of a `layers_` call, and plans that stand for their parameters."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern import _native
from llmkern.ops._layer_packed import form_of
from llmkern.ops._layer_sizes import TENSORS, Needs
from llmkern.programs.program import Program, ProgramError, parse

__all__ = ["Layer", "Layers", "layers_of", "plan_layers", "plan_of", "texts_of"]

_OP = "layers_"
_PLAN = "_llmkern_plan"


class Layer(NamedTuple):
    """One layer of a call: its program, parsed and as text, and its tensors."""

    text: str
    program: Program
    tensors: list[Tensor | None]


@dataclass(frozen=True)
class Layers:
    """All layers of a call.

    each: all of them.  kinds: for each, which of `different` it is like.
    different: those whose programs differ, or the sizes, types or places of their tensors.
    """

    each: tuple[Layer, ...]
    kinds: tuple[int, ...]
    different: tuple[Layer, ...]


class Plan:
    """Contents of a plan's tensor, and which calls it has been checked for."""

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.texts = list(dict.fromkeys([layer.text for layer in layers.each]))
        self.parameters = [tensor for layer in layers.each for tensor in layer.tensors]
        self.needs: dict[tuple[Any, ...], tuple[Needs, ...]] = {}  # of `different`, by what hidden and inputs are like


def plan_layers(programs: str | Program | Sequence[str | Program], parameters: Sequence[Tensor | None]) -> Tensor:
    """Return a tensor that stands for `parameters` in calls of `layers_`, so that passing them takes no time.

    It keeps the tensors themselves: whatever is written to them counts.  Raises ValueError where the number of tensors
    is not that of whole layers.
    """
    texts = texts_of(programs)
    tensors = list(parameters)
    layers = layers_of(texts, tensors)
    native = _native.reason() is None
    plan: Tensor = torch.ops.llmkern.layers_plan(texts, tensors) if native else torch.zeros(1, dtype=torch.uint8)
    setattr(plan, _PLAN, Plan(layers))
    return plan


def texts_of(programs: str | Program | Sequence[str | Program]) -> list[str]:
    """Return the programs in the form of the op's schema."""
    return [str(each) for each in ([programs] if isinstance(programs, (str, Program)) else programs)]


def plan_of(parameters: Sequence[Tensor | None]) -> Plan | None:
    """Return the plan that a call's parameters are, or None."""
    return getattr(parameters[0], _PLAN, None) if len(parameters) == 1 else None


def layers_of(programs: Sequence[str], parameters: Sequence[Tensor | None]) -> Layers:
    """Return the layers of a call; its parameters may be a plan."""
    plan = plan_of(parameters)
    if plan is not None:
        if programs and list(dict.fromkeys(programs)) != plan.texts:
            raise ValueError(f"{_OP}: programs are other ones than those of the plan")
        return plan.layers
    if not programs:
        raise ValueError(f"{_OP}: programs has 0 elements, expected one, or one for each layer")
    texts, sizes = list(programs), [_parsed(text)[1] for text in programs]
    if len(texts) == 1 and sizes[0]:
        if not parameters or len(parameters) % sizes[0]:
            raise ValueError(f"{_OP}: parameters has {len(parameters)} elements, expected {sizes[0]} for each layer")
        count = len(parameters) // sizes[0]
        texts, sizes = texts * count, sizes * count
    if len(parameters) != sum(sizes):
        raise ValueError(f"{_OP}: parameters has {len(parameters)} elements, expected {sum(sizes)}")
    each, kinds, first = [], [], 0
    different: dict[tuple[Any, ...], tuple[int, Layer]] = {}
    for text, size in zip(texts, sizes, strict=True):
        layer = Layer(text, _parsed(text)[0], list(parameters[first : first + size]))
        form = map(form_of, layer.tensors)
        each.append(layer)
        kinds.append(different.setdefault((text, *form), (len(different), layer))[0])
        first += size
    return Layers(tuple(each), tuple(kinds), tuple([layer for _, layer in different.values()]))


@functools.lru_cache(maxsize=512)
def _parsed(text: str) -> tuple[Program, int]:
    """Parse the program; return it and the number of its tensors."""
    try:
        program = parse(text)
    except ProgramError as error:
        raise ValueError(f"{_OP}: programs: {error}") from None
    return program, sum([TENSORS[parameter.kind] for parameter in program.parameters()])
