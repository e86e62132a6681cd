"""Recognize experts whose weights are packed in one tensor for each projection.

Names and sizes propose: two parameters of 3 dimensions.  Probes decide: a copy with small random weights must compute
what an `experts` step of a program does, near and far, and its source and its operators decide nothing that the probes
do not show.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from llmkern.programs.program import ACTIVATIONS, GATES, Option, Place, Step
from llmkern.programs.run import Call, mixed
from llmkern.swap.derive import wrapped_functions
from llmkern.swap.guard import UNSEEN, Part, noted
from llmkern.swap.match import PROBE_SCALE, agrees, stand_in
from llmkern.swap.observe import Sources
from llmkern.swap.surroundings import Place as Registered
from llmkern.swap.track import Refused

__all__ = ["MOVES", "PRODUCTS", "Experts", "Layout", "Operators", "experts_of", "layout_of", "registered_experts"]

_DISPATCH = "transformers.integrations.moe"  # where a class's forward is replaced by what its config names
_INTERCHANGEABLE = ("eager", "grouped_mm", "batched_mm")
_HIDDEN, _INNER = 16, 8  # of experts that are probed; grouped products want whole vectors

# Operators that may take or give floating-point numbers: no comparison, limit or rounding is among them.
MOVES: tuple[str, ...] = (
    "_reshape_alias",
    "_to_copy",
    "_unsafe_view",
    "alias",
    "clone",
    "detach",
    "expand",
    "permute",
    "reshape",
)
MOVES += ("select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "zeros_like")
PRODUCTS = ("add", "addmm", "index", "linear", "mm", "mul", "new_zeros")
_COMPUTING = frozenset(("gelu", "index_add_", "relu", "sigmoid", "silu", *MOVES, *PRODUCTS))


class Layout(NamedTuple):
    """Names and sizes of packed experts' parameters: [experts, rows, columns], or turned, [experts, columns, rows].

    inner, down: names of the weights.  bias: what follows in the names of biases, None for none.
    hidden, columns: width of the hidden states, and of the activations.  gated: inner has rows for gates, too.
    """

    inner: str
    down: str
    bias: str | None
    experts: int
    hidden: int
    columns: int
    gated: bool
    turned: bool

    def sizes(self, name: str) -> tuple[int, int]:
        """Return the rows and columns of one expert's weight of that name."""
        if name == self.down:
            return self.hidden, self.columns
        return self.columns * (1 + self.gated), self.hidden

    def weight(self, tensor: Tensor) -> Tensor:
        """Return a weight as [experts, rows, columns]."""
        return tensor.mT if self.turned else tensor

    def places(self, path: str, interleaved: bool) -> list[Place]:
        """Return the places of an `experts` step."""
        inner, down = f"{path}.{self.inner}", Place(f"{path}.{self.down}")
        if not self.gated:
            return [Place(inner), down]
        ranges = ((0, 1, 2), (1, 2, 2)) if interleaved else ((0, self.columns, 0), (self.columns, 2 * self.columns, 0))
        return [*[Place(inner, rows=rows) for rows in ranges], down]


class Experts(NamedTuple):
    """Packed experts.  options: of an `experts` step.  interleaved: gates and ups alternate in the rows."""

    layout: Layout
    options: dict[str, Option]
    interleaved: bool
    parts: tuple[Part, ...]


def layout_of(module: nn.Module) -> Layout | None:
    """Return how experts are packed, judged by names and sizes alone; None where there are none."""
    held = {name: p for name, p in module._parameters.items() if p is not None}
    names = [name for name, p in held.items() if p.dim() == 3]
    if len(names) != 2 or module._buffers:
        return None
    inner, down = names if "down" in names[1] else names[::-1]
    bias = next((ending for ending in ("_bias", ".bias") if inner + ending in held), None)
    if set(held) - {inner, down} != (set() if bias is None else {inner + bias, down + bias}):
        return None
    (experts, a, b), (count, c, d) = held[inner].shape, held[down].shape
    if experts != count:
        return None
    for gated, turned, fits in (
        (True, False, (a, b) == (2 * d, c)),
        (True, True, (a, b) == (d, 2 * c)),
        (False, False, (a, b) == (d, c)),
    ):
        if fits:
            hidden, columns = (d, c) if turned else (c, d)
            return Layout(inner, down, bias, experts, hidden, columns, gated, turned)
    return None


def registered_experts(module: nn.Module) -> tuple[Registered, ...]:
    """Return the registry entries that decide what the experts' forward calls: for a guard."""
    forward: Any = type(module).forward
    if forward.__globals__.get("__name__") != _DISPATCH:
        return ()
    config: Any = module.config
    name = config._experts_implementation
    interface = next(cell.cell_contents for cell in forward.__closure__ if hasattr(cell.cell_contents, "get_interface"))
    shown = f"the function of experts registered as {name!r}"
    return tuple([(held, name, shown) for held in (interface._local_mapping, type(interface)._global_mapping)])


def experts_of(module: nn.Module) -> Experts | None:
    """Return what packed experts compute, or None where it is no `experts` step.

    Raises `Refused` where it may be something else on other inputs.
    """
    layout = layout_of(module)
    if layout is None:
        return None
    own = _own_forward(module)
    weights = _SmallExperts(layout)
    shell = stand_in(module, parameters=weights.parameters)
    seen = []
    for call in weights.calls():
        for forward in dict.fromkeys((type(shell).forward, own)):
            try:
                seen.append((call, forward(shell, *call)))
            except Exception:  # made for something else
                return None
    for step, interleaved in _expert_steps(module, layout):
        if all(agrees(out, weights.expected(step, *call)) for call, out in seen):
            parts = noted(shell)
            with Sources(every_index=True) as sources:
                own(shell, *seen[0][0])
            with Operators(step.option("limit")) as operators:
                own(shell, *seen[0][0])
            reason = sources.reason or operators.reason("its experts compute", _COMPUTING)
            if parts is None or reason:
                raise Refused(reason or UNSEEN)
            return Experts(layout, dict(step.options), interleaved, parts)
    return None


def _own_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the forward that the class defines; transformers may have put others that compute the same before it."""
    forward: Any = type(module).forward
    if forward.__globals__.get("__name__") != _DISPATCH:
        own: Callable[..., Any] = forward
        return own
    for held, name, shown in registered_experts(module):
        if name not in _INTERCHANGEABLE:
            raise Refused(f"its experts are computed by {name!r}")
        found: Any = held.get(name)
        if found is not None and found.__module__ != _DISPATCH:
            raise Refused(f"{shown} is not the one of transformers")
    return wrapped_functions(forward)[-1]


def _expert_steps(module: nn.Module, layout: Layout) -> Iterator[tuple[Step, bool]]:
    """Yield what the experts may compute, with whether gates and ups alternate, the likely ones first."""
    numbers = [value for value in vars(module).values() if isinstance(value, float) and value > 0]
    kinds: Any = GATES if layout.gated else ACTIVATIONS
    orders = (False, True) if layout.gated else (False,)
    for limit, offset, interleaved, kind in itertools.product([None, *numbers], (None, 1.0), orders, kinds):
        small = layout._replace(hidden=_HIDDEN, columns=_INNER)
        step = Step(("u",), "experts", ("x", "r"), tuple(small.places("e", interleaved)))
        yield step.with_options(activation=kind, limit=limit, offset=offset), interleaved


class _SmallExperts:
    """Random weights of as many experts, smaller ones; implements `Experts` of llmkern/programs/run.py."""

    def __init__(self, layout: Layout) -> None:
        draw = torch.Generator().manual_seed(0)
        self.layout, self.draw = layout._replace(hidden=_HIDDEN, columns=_INNER), draw
        self.parameters: dict[str, Tensor] = {}
        for name in (layout.inner, layout.down):
            rows, columns = self.layout.sizes(name)
            weight = torch.randn(layout.experts, rows, columns, generator=draw) * columns**-0.5
            self.parameters[name] = self.layout.weight(weight).contiguous()
            if layout.bias is not None:
                self.parameters[name + layout.bias] = torch.randn(layout.experts, rows, generator=draw)

    def calls(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield hidden states, chosen experts and their weights: every expert, a few, and one token with large
        values.
        """
        count = self.layout.experts
        top = min(2, count)
        for tokens, spread in ((-(-count // top), 1.0), (3, PROBE_SCALE), (1, 1.0)):
            x = torch.randn(tokens, _HIDDEN, generator=self.draw) * spread
            index = torch.arange(tokens * top).view(tokens, top) % count
            yield x, index, torch.rand(tokens, top, generator=self.draw) + 0.1

    def expected(self, step: Step, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        dense = x.new_zeros(x.shape[0], self.layout.experts).scatter(-1, index, weights)
        return mixed(step, x, dense, self)

    def expert(self, path: str, number: int, x: Tensor, call: Call) -> Tensor:
        name = path.removeprefix("e.")
        bias = None if self.layout.bias is None else self.parameters[name + self.layout.bias][number]
        return F.linear(x, self.layout.weight(self.parameters[name])[number], bias)


class Operators(TorchDispatchMode):
    """Record the names of the operators within the block that take or give floating-point numbers.

    limit: the clamp to ±limit is not one of them.
    """

    def __init__(self, limit: Any = None) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._limit = limit

    def reason(self, said: str, known: frozenset[str]) -> str:
        """Return a sentence that begins so and names an operator that is not known; "" if all are."""
        unknown = sorted(self.names - known)
        return f"{said} {unknown[0]}" if unknown else ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        bounds = [abs(x) for x in (*args, *(kwargs or {}).values()) if isinstance(x, (int, float))]
        if name != "clamp" or self._limit is None or set(bounds) != {self._limit}:
            found: list[Tensor] = []
            tree_map(lambda x: found.append(x) if isinstance(x, Tensor) else None, (args, kwargs, out))
            if any(tensor.is_floating_point() for tensor in found):
                self.names.add(name)
        return out
