"""Gated MLPs, `down(act(gate(x)) * up(x))`, with gate and up apart or packed in one projection."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from llmkern import ops
from llmkern.swap.derive import untouched
from llmkern.swap.guard import UNSEEN, guarded, noted
from llmkern.swap.match import (
    PROBE_SCALE,
    Match,
    agrees,
    is_stateless,
    linear_like,
    probe,
    remembered,
    stand_in,
    why_elsewhere,
)

SWITCHES = ("mlp",)

_HIDDEN, _INTERMEDIATE = 6, 10  # of the small layers that the class's forward is probed with

# The op that computes `act(gate) * up` for each activation, and the activation as the probe expects it.
_GATED: dict[str, tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": ("swiglu", F.silu, ops.swiglu),
    "gelu": ("gelu", F.gelu, lambda gate, up: ops.gelu(gate) * up),
    "gelu_tanh": (
        "gelu",
        lambda gate: F.gelu(gate, approximate="tanh"),
        lambda gate, up: ops.gelu(gate, "tanh") * up,
    ),
}


def find(module: nn.Module) -> Match | None:
    linears: dict[str, Any] = {name: child for name, child in module._modules.items() if linear_like(child)}
    if len(linears) not in (2, 3) or module._parameters or not is_stateless(module):
        return None
    sizes = tuple([(name, layer.in_features, layer.out_features) for name, layer in linears.items()])
    return remembered((type(module), sizes), module, partial(_recognise, module, linears))


def _recognise(module: nn.Module, linears: dict[str, Any]) -> Match | None:
    for names in permutations(linears):
        if not _shapes_fit([linears[n] for n in names]):
            continue
        for activation, (op, function, _) in _GATED.items():
            for packed_gate_first in (True, False) if len(names) == 2 else (True,):
                shell = _gated_shell(module, names, function, packed_gate_first)
                if shell is not None:
                    parts = noted(shell)
                    if parts is None:
                        return Match("mlp", "", UNSEEN)
                    if reason := why_elsewhere(shell, _small_layers(names)[1]):
                        return Match("mlp", "", reason)
                    attributes = (
                        ("_llmkern_linears", names),
                        ("_llmkern_activation", activation),
                        ("_llmkern_gate_first", packed_gate_first),
                    )
                    cls = guarded(type(module), _forward, *attributes, op=op, parts=parts)
                    sample = partial(_sample, op, activation, linears[names[-1]].in_features)
                    return Match("mlp", op, cls=cls, sample=sample)
    for names in permutations(linears):
        if len(names) == 3 and _shapes_fit([linears[n] for n in names]):
            small, x = _small_layers(names)
            # An attention's q, k and v fit as well where they are square; but one tensor does not make it give one.
            if probe(stand_in(module, small), x) is not None:
                return Match(
                    "mlp", "", f"it has the layers of a gated MLP, but its gate is none of {', '.join(_GATED)}"
                )
    return None


def _shapes_fit(linears: list[Any]) -> bool:
    """Return True if the sizes are those of (gate, up, down), or of (gate and up packed, down)."""
    *into, down = linears
    hidden, intermediate = down.out_features, down.in_features
    packed = 2 if len(into) == 1 else 1
    return all(layer.in_features == hidden and layer.out_features == packed * intermediate for layer in into)


@cache
def _small_layers(names: tuple[str, ...]) -> tuple[dict[str, nn.Module], Tensor]:
    """Layers to probe the class's forward with, in the roles (gate, up, down) or (packed, down), and an input."""
    generator = torch.Generator().manual_seed(0)
    into_sizes = [(_HIDDEN, _INTERMEDIATE)] * 2 if len(names) == 3 else [(_HIDDEN, 2 * _INTERMEDIATE)]
    sizes = [*into_sizes, (_INTERMEDIATE, _HIDDEN)]
    small: dict[str, nn.Module] = {n: skip_init(nn.Linear, *size) for n, size in zip(names, sizes, strict=True)}
    with torch.no_grad():
        for layer in small.values():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return small, torch.randn(2, 3, _HIDDEN, generator=generator)


def _gated_shell(
    module: nn.Module, names: tuple[str, ...], activation: Callable[[Tensor], Tensor], gate_first: bool
) -> nn.Module | None:
    """The shell whose forward was run on small layers, if that is the gated MLP with these roles."""
    small, near = _small_layers(names)
    *into, down = [small[name] for name in names]
    shell = stand_in(module, small)
    for x in (near, near * PROBE_SCALE):
        with torch.no_grad():
            gate, up = _gate_and_up([layer(x) for layer in into], gate_first)
            expected = down(activation(gate) * up)
        if not agrees(probe(shell, x), expected):
            return None
    return shell


def _gate_and_up(projected: list[Tensor], gate_first: bool) -> tuple[Tensor, Tensor]:
    first, second = projected if len(projected) == 2 else projected[0].chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


def _sample(op: str, activation: str, intermediate: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    x = torch.zeros(1, 1, intermediate, dtype=dtype, device=device)
    if op == "swiglu":
        return {"gate": x, "up": x}
    return {"x": x, "approximate": "tanh" if activation == "gelu_tanh" else "none"}


def _beyond(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return why the op cannot take this call, or None."""
    if len(args) != 1 or kwargs:
        return "the MLP is called with more than its input, or by keyword"
    weights = [self._modules[name]._parameters.get("weight") for name in self._llmkern_linears]
    if len({w.dtype for w in weights if w is not None and w.is_floating_point()}) > 1:  # some cast between them
        return "its linear layers have different dtypes"
    return None


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    op, _, compute = _GATED[self._llmkern_activation]
    reason = _beyond(self, args, kwargs)
    if reason is not None:
        return untouched(self, op, reason, args, kwargs)
    layers, names = self._modules, self._llmkern_linears
    gate, up = _gate_and_up([layers[name](args[0]) for name in names[:-1]], self._llmkern_gate_first)
    return layers[names[-1]](compute(gate, up))
