"""RMSNorm and LayerNorm over the last dimension, whatever the class is called: what counts is what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import ops
from llmkern.dispatch import implementation
from llmkern.swap.derive import derive
from llmkern.swap.found import Found, agrees, is_stateless, probe, stand_in

SWITCHES = ("norms",)

_DEFAULT_HIDDEN = 64  # to probe a norm that has no parameters and states no shape


def find(module: nn.Module) -> Found | None:
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    if module._modules or set(parameters) - {"weight", "bias"} or not is_stateless(module):
        return None
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is not None and weight.device.type == "meta":
        return Found("norm", "", "its weight is offloaded, and only there while it runs") if _named(module) else None
    one_dimensional = all(p.dim() == 1 and p.is_floating_point() and p.numel() for p in parameters.values())
    if one_dimensional and (weight is not None or bias is None):
        found = _recognise(module, weight, bias)
        if found is not None:
            return found
    if _named(module):
        return Found("norm", "", "it is neither an rms_norm nor a layer_norm over the last dimension")
    return None


def _named(module: nn.Module) -> bool:
    """Whether the class calls itself a norm: then leaving it alone deserves a line in the report."""
    return "norm" in type(module).__name__.lower()


def _recognise(module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> Found | None:
    eps_names = [name for name, value in vars(module).items() if _may_be_eps(name, value)]
    if not eps_names:
        return None
    if weight is not None:
        x = _inputs(weight.numel()).to(weight.device)
    else:
        x = _inputs((getattr(module, "normalized_shape", None) or (_DEFAULT_HIDDEN,))[-1])
    w, b = (None if p is None else p.detach().float() for p in (weight, bias))
    out = probe(stand_in(module, parameters={"weight": w, "bias": b} if weight is not None else None), x)
    if out is None:
        return None
    for name in eps_names:
        eps = _eps(module, name, x)
        for offset in (0.0, 1.0) if weight is not None else (0.0,):
            call: dict[str, Any] = {"x": x, "weight": w, "bias": b, "eps": eps, "weight_offset": offset}
            if agrees(out, implementation("rms_norm", "reference").fn(**call)):
                cls = derive(type(module), _rms_forward, ("_llmkern_eps", name), ("_llmkern_offset", offset))
                return Found("norm", "rms_norm", cls=cls, sample=_sample(call))
        call = {"x": x, "weight": w, "bias": b, "eps": eps}
        if agrees(out, implementation("layer_norm", "reference").fn(**call)):
            cls = derive(type(module), _layer_forward, ("_llmkern_eps", name))
            return Found("norm", "layer_norm", cls=cls, sample=_sample(call))
    return None


def _may_be_eps(name: str, value: Any) -> bool:
    return (isinstance(value, float) and 0 <= value < 1) or (name == "eps" and value is None)


def _inputs(hidden: int) -> Tensor:
    """[3, s, hidden]: rows of very different size, so that eps decides the small ones; not centred, so that a mean
    shows; and s is not hidden, so that a norm over another dimension fails."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 3 if hidden == 2 else 2, hidden, generator=generator)
    return x * torch.tensor([1e-3, 1.0, 8.0]).view(3, 1, 1) + torch.tensor([0.0, 0.1, 1.0]).view(3, 1, 1)


def _sample(call: dict[str, Any]) -> Callable[[torch.dtype, torch.device], dict[str, Any]]:
    return lambda dtype, device: {k: v.to(device, dtype) if isinstance(v, Tensor) else v for k, v in call.items()}


def _eps(module: Any, name: str, x: Tensor) -> float:
    eps = getattr(module, name)
    return torch.finfo(x.dtype).eps if eps is None else eps  # torch.nn.RMSNorm's default


def _rms_forward(self: Any, x: Tensor) -> Tensor:
    weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
    if weight is not None and weight.dtype != x.dtype:
        return self._llmkern_original.forward(self, x)  # whose result has the promoted dtype
    eps = _eps(self, self._llmkern_eps, x)
    return ops.rms_norm(x, weight, eps, weight_offset=self._llmkern_offset, bias=bias)


def _layer_forward(self: Any, x: Tensor) -> Tensor:
    weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
    if weight is not None and weight.dtype != x.dtype:
        return self._llmkern_original.forward(self, x)
    return ops.layer_norm(x, weight, bias, _eps(self, self._llmkern_eps, x))
