"""RMSNorm and LayerNorm over the last dimension, whatever the class and its attributes are called: what counts is
what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import ops
from llmkern.dispatch import implementation
from llmkern.swap.derive import untouched
from llmkern.swap.guard import UNSEEN, guarded, noted
from llmkern.swap.match import PROBE_SCALE, Match, agrees, is_stateless, probe, remembered, stand_in, why_elsewhere

SWITCHES = ("norms",)

_HIDDEN = 64  # to probe a norm that has no parameters and states no shape
_WRITTEN_OUT = (1e-5, 1e-6, 1e-8, 1e-12, 1e-7, torch.finfo(torch.float32).eps)  # for an eps that is no attribute


def find(module: nn.Module) -> Match | None:
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    if module._modules or len(parameters) > 2 or not is_stateless(module):
        return None
    if any(p.is_meta for p in parameters.values()):
        return Match("norm", "", "its weight is offloaded, and only there while it runs") if _named(module) else None
    if all(p.dim() == 1 and p.is_floating_point() and p.numel() for p in parameters.values()):
        # A weight of zeros makes all norms look alike: no evidence for one with other weights.
        sizes = tuple([(name, p.shape, bool(p.any())) for name, p in parameters.items()])
        found = remembered((type(module), sizes), module, partial(_recognise, module, parameters))
        if found is not None:
            return found
    if _named(module):
        return Match("norm", "", "it is neither an rms_norm nor a layer_norm over the last dimension")
    return None


def _named(module: nn.Module) -> bool:
    """Return True if the class is named a norm, so that leaving it deserves a line in the report."""
    return "norm" in type(module).__name__.lower()


def _recognise(module: nn.Module, parameters: dict[str, nn.Parameter]) -> Match | None:
    values = {name: p.detach().float() for name, p in parameters.items()}
    sizes = {p.numel() for p in values.values()} or {(getattr(module, "normalized_shape", None) or (_HIDDEN,))[-1]}
    if len(sizes) != 1 or not (parameters or _may_have_eps(module) or _named(module)):
        return None
    x = _inputs(sizes.pop())
    x = x.to(next((p.device for p in values.values()), x.device))
    shell = stand_in(module, parameters=values)
    out = probe(shell, x)
    if out is None:
        return None
    for weight, bias in _roles(list(values)):
        w, b = (None if name is None else values[name] for name in (weight, bias))
        for eps in _eps_sources(module):
            number = eps_of(module, eps, x)
            for offset in (0.0, 1.0) if w is not None else (0.0,):
                call = {"x": x, "weight": w, "bias": b, "eps": number, "weight_offset": offset}
                if agrees(out, implementation("rms_norm", "reference").fn(**call)):
                    return _found(module, shell, "rms_norm", (weight, bias, eps, offset), call)
            for offset in (0.0, 1.0) if w is not None else (0.0,):
                call = {"x": x, "weight": _offset(w, offset), "bias": b, "eps": number}
                if agrees(out, implementation("layer_norm", "reference").fn(**call)):
                    return _found(module, shell, "layer_norm", (weight, bias, eps, offset), call)
    return None


def _found(module: nn.Module, shell: nn.Module, op: str, norm: tuple[Any, ...], call: dict[str, Any]) -> Match:
    """norm: names of weight and bias, where eps comes from, and what is added to the weight."""
    parts = noted(shell, live=norm[2])
    if parts is None:
        return Match("norm", "", UNSEEN)
    beyond_autocast = op == "layer_norm" and norm[3] != 0  # its forward leaves the call where autocast is on
    if reason := why_elsewhere(shell, call["x"], beyond_autocast=beyond_autocast):
        return Match("norm", "", reason)
    forward = _rms_forward if op == "rms_norm" else _layer_forward
    cls = guarded(type(module), forward, ("_llmkern_norm", norm), op=op, parts=parts)
    return Match("norm", op, cls=cls, sample=_sample(call))


def _roles(names: list[str]) -> list[tuple[str | None, str | None]]:
    """Return the possible pairs of names (weight, bias)."""
    if len(names) == 2:
        return [(names[0], names[1]), (names[1], names[0])]
    return [(names[0], None)] if names else [(None, None)]


def _may_have_eps(module: nn.Module) -> bool:
    return any(isinstance(value, float) or name == "eps" for name, value in vars(module).items())


def _eps_sources(module: nn.Module) -> Iterator[str | float]:
    """Names of attributes that may hold eps (nn.RMSNorm's may be None), then numbers that its code may contain."""
    for name, value in vars(module).items():
        if (isinstance(value, float) and 0 <= value < 1) or (name == "eps" and value is None):
            yield name
    yield from _WRITTEN_OUT


def eps_of(module: Any, source: str | float, x: Tensor) -> float:
    """The number that an eps source (as in `_llmkern_norm`) stands for."""
    if not isinstance(source, str):
        return source
    eps = getattr(module, source)
    return torch.finfo(x.dtype).eps if eps is None else eps  # torch.nn.RMSNorm's default


def _inputs(hidden: int) -> Tensor:
    """[4, s, hidden]: rows of very different size, so that eps decides the small ones; not centred, so that a mean
    shows; and s is not hidden, so that a norm over another dimension fails."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3 if hidden == 2 else 2, hidden, generator=generator)
    scales, shifts = torch.tensor([[1e-3, 1.0, 8.0, PROBE_SCALE], [0.0, 0.1, 1.0, 0.0]]).view(2, 4, 1, 1)
    return x * scales + shifts


def _sample(call: dict[str, Any]) -> Callable[[torch.dtype, torch.device], dict[str, Any]]:
    shapes = {k: v.shape if isinstance(v, Tensor) else v for k, v in call.items()}  # a report need not keep weights
    return lambda dtype, device: {
        k: torch.zeros(v, dtype=dtype, device=device) if isinstance(v, torch.Size) else v for k, v in shapes.items()
    }


def _beyond(self: Any, weight: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return why a call is not `norm(x)` in the weight's dtype, or None."""
    if len(args) != 1 or kwargs:
        return "the norm is called with more than its input, or by keyword"
    if weight is not None and weight.dtype != args[0].dtype:
        return f"the input is {args[0].dtype} and the weight {weight.dtype}, so the result has the promoted dtype"
    return None


def _held(self: Any, name: str | None) -> Any:
    """The parameter of that name, or the tensor that has taken its place, as where it is parametrized."""
    if name is None or name in self._parameters:
        return self._parameters.get(name)
    return getattr(self, name)


def _rms_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    weight_name, bias_name, eps, offset = self._llmkern_norm
    weight, bias = _held(self, weight_name), _held(self, bias_name)
    reason = _beyond(self, weight, args, kwargs)
    if reason is not None:
        return untouched(self, "rms_norm", reason, args, kwargs)
    return ops.rms_norm(args[0], weight, eps_of(self, eps, args[0]), weight_offset=offset, bias=bias)


def _layer_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    weight_name, bias_name, eps, offset = self._llmkern_norm
    weight, bias = _held(self, weight_name), _held(self, bias_name)
    reason = _beyond(self, weight, args, kwargs)
    if reason is None and offset and torch.is_autocast_enabled(args[0].device.type):
        reason = "autocast chooses the dtypes"
    if reason is not None:
        return untouched(self, "layer_norm", reason, args, kwargs)
    return ops.layer_norm(args[0], _offset(weight, offset), bias, eps_of(self, eps, args[0]))


def _offset(weight: Tensor | None, offset: float) -> Tensor | None:
    return weight + offset if weight is not None and offset else weight
