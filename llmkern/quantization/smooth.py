"""Smooth activations: move the magnitude of outlier channels into the weights (SmoothQuant, Xiao et al. 2023,
arXiv:2211.10438).

A norm's output x and the weight W of a layer that reads it are replaced by x/s and W·s, per input channel.  s is
a power of two, so neither rounds: the floating-point model computes the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmkern.nn.quantized_linear import weight_out_in
from llmkern.quantization.observe import Observed

__all__ = ["Fold", "plan_folds"]

ALPHA = 0.4
"""s = amax(x)^α / amax(W)^(1−α); the paper's 0.5 moves more of the difficulty into the weights."""


@dataclass(frozen=True)
class Fold:
    """A norm, its parameters divided by `s`, and the layers whose input channels are to be multiplied by `s`."""

    norm: nn.Module
    parameters: dict[str, Tensor]
    layers: tuple[nn.Module, ...]
    s: Tensor

    def apply(self) -> None:
        """Write the divided parameters into the norm."""
        with torch.no_grad():
            for name, value in self.parameters.items():
                self.norm._parameters[name].copy_(value)  # type: ignore[union-attr]


def plan_folds(observed: Observed) -> list[Fold]:
    """Return the folds that the observed groups allow; the model is not changed."""
    folds = []
    for norm, layers in observed.groups.items():
        if any(layer not in observed.amax for layer in layers):
            continue
        s = _scales(observed.amax[layers[0]], [weight_out_in(layer).detach() for layer in layers])
        parameters = _divided(norm, s)
        if parameters is not None:
            folds.append(Fold(norm, parameters, tuple(layers), s))
    return folds


def _scales(amax: Tensor, weights: list[Tensor]) -> Tensor:
    """Return scales that are powers of two, typically 1; 1 for channels that are never used."""
    weight_amax = torch.stack([w.abs().amax(0).float() for w in weights]).amax(0)
    wanted = ALPHA * amax.log2() - (1 - ALPHA) * weight_amax.log2()
    used = wanted.isfinite()
    if not bool(used.any()):
        return torch.ones_like(amax)
    exponent = torch.where(used, wanted - wanted[used].median(), torch.zeros_like(wanted)).round()
    return torch.exp2(exponent.clamp(-8, 8))


def _divided(norm: nn.Module, s: Tensor) -> dict[str, Tensor] | None:
    """Return the parameters with which the norm gives its output divided by s, or None if a trial shows that it does
    not.

    Trying spares a list of classes: weights that multiply, weights of which 1 is missing (Gemma), biases.
    """
    weight, bias = norm._parameters["weight"], norm._parameters.get("bias")
    if weight is None or weight.shape != s.shape or set(_own(norm)) - {"weight", "bias"}:
        return None
    s = s.to(weight.device)
    x = torch.randn(4, s.numel(), generator=torch.Generator().manual_seed(0), device="cpu")
    x = x.to(weight.device, weight.dtype)
    original = {name: value.detach().clone() for name, value in _own(norm).items()}
    with torch.no_grad():
        wanted = norm(x) / s
        for offset in (0.0, 1.0):
            trial = {"weight": ((weight.float() + offset) / s - offset).to(weight.dtype)}
            if bias is not None:
                trial["bias"] = (bias.float() / s).to(bias.dtype)
            fold = Fold(norm, trial, (), s)
            try:
                fold.apply()
                got = norm(x)
            finally:
                Fold(norm, original, (), s).apply()
            # Bit for bit without an offset; 1 + w and its inverse round in fp32.
            near = 4 * torch.finfo(torch.float32).eps * wanted.abs() if offset else torch.zeros_like(wanted)
            if bool(((got - wanted).abs() <= near).all()):
                return trial
    return None


def _own(norm: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in norm._parameters.items() if value is not None}
