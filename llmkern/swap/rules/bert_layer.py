"""Encoder layers with their norms after the sums (BERT, RoBERTa, DistilBERT, …) as one op.

A layer with one attention, six linear layers and two layer norms, wherever within it they are; what it computes is
found out by running a small copy of it, which has to agree with the op's reference.  At each call the op serves what
it can; the rest goes through the layer's own forward, whose parts are swapped one by one as well, with the reason on
record (llmkern/swap/encoder_forward.py).
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern.dispatch import implementation
from llmkern.ops.encoder_layer import ACTIVATIONS
from llmkern.swap.derive import as_before, derive
from llmkern.swap.encoder_forward import LINEARS, OP, EncoderParts, forward
from llmkern.swap.found import FAR, Found, agrees, linear_like
from llmkern.swap.granted import Part, Path, below, noted
from llmkern.swap.layer_probe import Asked, Computed, run, small_copy
from llmkern.swap.rules import attention as attention_rule
from llmkern.swap.rules import norms as norms_rule
from llmkern.swap.whole_layer import LinearPart, NormPart

SWITCHES = ("attention", "norms", "mlp")

_HIDDEN, _INNER, _BATCH, _LENGTH = 6, 10, 2, 3  # of the probe
_MOST_CHILDREN = 8  # of a layer's own; a model or a stack of layers has more, or is told apart by its linear layers


def find(module: nn.Module) -> Found | None:
    if implementation(OP, "cpu").backend.missing is not None or len(module._modules) > _MOST_CHILDREN:
        return None
    linears = {tuple(path.split(".")): child for path, child in module.named_modules() if linear_like(child)}
    if len(linears) != len(LINEARS) or any(p is not None for p in module._parameters.values()):
        return None
    attentions, norms = _attentions(module), _norms(module)
    if len(attentions) != 1 or len(norms) != 2 or norms[0][1] != norms[1][1]:
        return None
    layer = EncoderParts(
        norms=(norms[0][0], norms[1][0]),
        linears=tuple([LinearPart(path) for path in linears]),
        positional=tuple(inspect.signature(type(module).forward).parameters)[2:],
        granted=norms[0][2] + norms[1][2],
    )
    probed = partial(_probed, module, layer, attentions[0], list(linears.values()))
    passed = probed(1.0)
    if passed is None or probed(FAR) is None:
        return None
    cls = derive(type(module), forward, ("_llmkern_layer", passed))
    return Found("layer", OP, cls=cls, sample=partial(_sample, passed), is_whole=True)


def _attentions(module: nn.Module) -> list[Path]:
    """Where attentions are that can be swapped and are not causal."""
    found = []
    for path, child in module.named_modules():
        attention = None if not path or linear_like(child) else attention_rule.find(as_before(child))
        if attention is not None and attention.op and not attention.reason and not getattr(child, "is_causal", False):
            found.append(tuple(path.split(".")))
    return found


def _norms(module: nn.Module) -> list[tuple[NormPart, float, tuple[Part, ...]]]:
    """The layer norms, each with its eps and what it takes for granted."""
    found = []
    for path, child in module.named_modules():
        norm: Any = None if linear_like(child) or child._modules else norms_rule.find(as_before(child))
        if norm is not None and norm.op == "layer_norm":
            weight, bias, eps = norm.cls._llmkern_norm
            part = NormPart(tuple(path.split(".")), weight, bias, eps)
            number = norms_rule.eps_of(child, eps, torch.empty(0))
            found.append((part, number, below(part.path, norm.cls._llmkern_parts)))
    return found


def _probed(
    module: nn.Module, layer: EncoderParts, attention: Path, linears: list[Any], spread: float
) -> EncoderParts | None:
    """The layer with what its attention asks for, if a small copy of it computes what the op does.

    spread: of the values, and of the activation's inputs; far out its forms cannot be told from each other.
    """
    across = linears[0].out_features
    if any(linear.out_features != across for linear in linears[:3]) or linears[3].in_features != across:
        return None
    call, asked = _small_call(layer, across), Asked()
    for name in ("v_weight", "up_weight"):
        call[name] *= spread
    stand_ins: dict[Path, nn.Module] = {}
    for norm, name in zip(layer.norms, ("attention_norm", "output_norm"), strict=True):
        stand_ins[norm.path] = Computed(partial(_normed, call, name))
    for part, name in zip(layer.linears, LINEARS, strict=True):
        weight, bias = call[f"{name}_weight"], call[f"{name}_bias"]
        stand_ins[part.path] = Computed(partial(F.linear, weight=weight, bias=bias))
    copy = small_copy(module, stand_ins, attention, asked)
    out = run(copy, call["hidden"], attention_mask=call["mask"])
    scale, granted = asked.arguments.pop("scaling", None), noted(copy)
    if out is None or scale is None or granted is None or any(asked.arguments.values()) or across % asked.heads:
        return None
    for activation in ACTIVATIONS:
        found = {"heads": asked.heads, "sm_scale": float(scale), "activation": activation}
        if agrees(out, implementation(OP, "reference").fn(**call, **found)):
            return replace(layer, **found, granted=granted + layer.granted)  # type: ignore[arg-type]
    return None


def _small_call(layer: EncoderParts, across: int) -> dict[str, Any]:
    """The op's call for the probe but for what is to be found out: the layer's heads, and a small hidden size."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    sizes = dict.fromkeys("qkv", (across, _HIDDEN)) | {"o": (_HIDDEN, across)}
    sizes |= {"up": (_INNER, _HIDDEN), "down": (_HIDDEN, _INNER)}
    call: dict[str, Any] = {"hidden": randn(_BATCH, _LENGTH, _HIDDEN), "eps": 1e-5, "scheme": "w8a8"}
    call["mask"] = torch.full((_LENGTH, _LENGTH), -math.inf).triu(1)[None, None]
    for name, (rows, columns) in sizes.items():
        # Inputs of the activation as large as where its forms differ most.
        spread = 2.0 if name == "up" else 1.0
        call |= {f"{name}_weight": randn(rows, columns) * spread * columns**-0.5, f"{name}_scale": None}
        call[f"{name}_bias"] = randn(rows)
    for name in ("attention_norm", "output_norm"):
        call |= {name: randn(_HIDDEN), f"{name}_bias": randn(_HIDDEN)}
    return call


def _normed(call: dict[str, Any], name: str, x: Tensor) -> Tensor:
    y: Tensor = implementation("layer_norm", "reference").fn(
        x=x, weight=call[name], bias=call[f"{name}_bias"], eps=call["eps"]
    )
    return y


def _sample(layer: EncoderParts, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """A small call."""
    size = layer.heads
    norm, square = torch.zeros(size, dtype=dtype, device=device), torch.zeros(size, size, dtype=dtype, device=device)
    call: dict[str, Any] = {"hidden": square[None, :1], "mask": None, "attention_norm": norm, "output_norm": norm}
    call |= {"attention_norm_bias": norm, "output_norm_bias": norm, "heads": size, "eps": 1e-5}
    for name in LINEARS:
        call |= {f"{name}_weight": square, f"{name}_scale": None, f"{name}_bias": None}
    return call | {"sm_scale": layer.sm_scale, "activation": layer.activation, "scheme": "w8a8"}
