"""Encoder layers with their norms after the sums (BERT, RoBERTa, DistilBERT, …) as one op.

A layer with one attention, six linear layers and two layer norms, wherever within it they are; what it computes is
found out by running small copies of it, which have to agree with the op's reference.  At each call the op serves what
it can; the rest goes through the layer's own forward, whose parts are swapped one by one as well, with the reason on
record (llmkern/swap/encoder_forward.py).
"""

from __future__ import annotations

import inspect
import math
import types
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern.dispatch import implementation
from llmkern.integrations.transformers.attention import INTERFACE
from llmkern.ops.encoder_layer import ACTIVATIONS
from llmkern.swap.derive import as_before, is_own
from llmkern.swap.encoder_forward import LINEARS, OP, EncoderParts, forward
from llmkern.swap.guard import UNSEEN, Part, Path, below, noted
from llmkern.swap.layer_probe import Asked, Computed, NotAlike, Raises, differs, run, small_copy
from llmkern.swap.match import PROBE_SCALE, Match, agrees, linear_like
from llmkern.swap.observe import aside
from llmkern.swap.rules import activations as activation_rule
from llmkern.swap.rules import attention as attention_rule
from llmkern.swap.rules import norms as norms_rule
from llmkern.swap.whole_layer import LinearPart, NormPart, at, whole_class

SWITCHES = ("attention", "norms", "mlp")

_HIDDEN, _INNER, _BATCH, _LENGTH = 6, 10, 2, 3  # of the probe
_MOST_CHILDREN = 8  # of a layer's own; a model or a stack of layers has more, or is told apart by its linear layers


def find(module: nn.Module) -> Match | None:
    if (
        implementation(OP, "cpu").backend.missing is not None
        or not is_own(nn.Linear, "forward")
        or len(module._modules) > _MOST_CHILDREN
    ):
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
    )
    try:
        passed, notes = _probed(module, layer, attentions[0], list(linears.values()))
    except Raises:  # a model with one layer, say
        return None
    except NotAlike as error:
        return Match("layer", OP, str(error), is_whole=True)
    cls = whole_class(module, at(module, attentions[0]), forward, passed, notes + norms[0][2] + norms[1][2])
    return Match("layer", OP, cls=cls, sample=partial(_sample, passed), is_whole=True)


def _attentions(module: nn.Module) -> list[Path]:
    """Where attentions are that can be swapped and are not causal."""
    found = []
    for path, child in module.named_modules():
        attention = None if not path or linear_like(child) else attention_rule.find(as_before(child))
        causal = getattr(child, "is_causal", True)  # as transformers' attention functions have it
        if attention is not None and attention.op and not attention.reason and causal is False:
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
            found.append((part, number, below(part.path, norm.cls._llmkern_guard.parts)))
    return found


_PROBES = (
    ("on small values", 1.0, torch.float32),
    ("on large values", PROBE_SCALE, torch.float32),  # where the activation's forms cannot be told from each other
    ("in float64", 1.0, torch.float64),
)


def _probed(
    module: nn.Module, layer: EncoderParts, attention: Path, linears: list[Any]
) -> tuple[EncoderParts, tuple[Part, ...]]:
    """The layer with what its attention asks for, and what its forward takes for granted.

    Raises `NotAlike` where a small copy of it does not compute what the op does."""
    across = linears[0].out_features
    if any(linear.out_features != across for linear in linears[:3]) or linears[3].in_features != across:
        raise NotAlike("its linear layers do not have the sizes of an encoder layer's")
    granted: tuple[Part, ...] = ()
    for how, spread, dtype in _PROBES:
        asked = Asked()
        call = _small_call(across, spread, dtype)
        stand_ins: dict[Path, nn.Module] = {}
        for norm, name in zip(layer.norms, ("attention_norm", "output_norm"), strict=True):
            stand_ins[norm.path] = Computed(partial(_normed, call, name))
        for part, name in zip(layer.linears, LINEARS, strict=True):
            weight, bias = call[f"{name}_weight"], call[f"{name}_bias"]
            stand_ins[part.path] = Computed(partial(F.linear, weight=weight, bias=bias))
        copy = small_copy(module, stand_ins, attention, {INTERFACE: asked})
        _set_activations_aside(module, copy)
        out = run(copy, how, asked, call["hidden"], attention_mask=call["mask"])
        notes = noted(copy)
        if notes is None:
            raise NotAlike(UNSEEN)
        granted += notes
        found = _matching(layer, call, asked, out, how)
        if layer.heads == 0:
            layer = found
        elif replace(layer, activation="") != replace(found, activation=""):
            raise NotAlike(f"its attention asks for another scale {how}")
    return layer, granted


def _set_activations_aside(module: nn.Module, copy: Any) -> None:
    """Let no probe look at the operators of activations, which are parts of the layer."""
    for path, child in module.named_modules():
        leaf: Any = None if child._modules or child._parameters or not path else at(copy, tuple(path.split(".")))
        if leaf is None:
            continue
        if type(child).__module__.startswith("torch.nn.") or activation_rule.find(as_before(child)):
            vars(leaf)["forward"] = aside(types.MethodType(type(leaf).forward, leaf))


def _matching(layer: EncoderParts, call: dict[str, Any], asked: Asked, out: Tensor, how: str) -> EncoderParts:
    """The layer with scale, heads and activation with which the op computes `out`; `NotAlike` where there are none."""
    others = asked.arguments.keys() - {"scaling", "is_causal"}
    scale = asked.arguments.get("scaling")
    if others or not isinstance(scale, float) or asked.arguments.get("is_causal", False) is not False:
        raise NotAlike(f"its attention asks for {', '.join(sorted(others)) or 'no scale, or a causal mask'}")
    if call["q_weight"].shape[0] % asked.heads:
        raise NotAlike("its heads have no width")
    for activation in (layer.activation,) if layer.heads else ACTIVATIONS:
        sizes = {"heads": asked.heads, "sm_scale": scale, "activation": activation}
        if agrees(out, implementation(OP, "reference").fn(**call, **sizes)):
            return replace(layer, **sizes)  # type: ignore[arg-type]
    raise differs(how)


def _small_call(across: int, spread: float, dtype: torch.dtype) -> dict[str, Any]:
    """The op's call for the probe but for what is to be found out: the layer's heads, and a small hidden size."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    sizes = dict.fromkeys("qkv", (across, _HIDDEN)) | {"o": (_HIDDEN, across)}
    sizes |= {"up": (_INNER, _HIDDEN), "down": (_HIDDEN, _INNER)}
    call: dict[str, Any] = {"hidden": randn(_BATCH, _LENGTH, _HIDDEN), "eps": 1e-5, "scheme": "w8a8"}
    call["mask"] = torch.full((_LENGTH, _LENGTH), -math.inf, dtype=dtype).triu(1)[None, None]
    for name, (rows, columns) in sizes.items():
        # Inputs of the activation as large as where its forms differ most.
        wide = (2.0 if name == "up" else 1.0) * (spread if name in ("up", "v") else 1.0)
        call |= {f"{name}_weight": randn(rows, columns) * wide * columns**-0.5, f"{name}_scale": None}
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
