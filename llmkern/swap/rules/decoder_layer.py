"""Decoder layers of the Llama family as one op: norm, attention with rotary embedding, norm, gated MLP, two sums.

Every part that the layer consists of is one that its own rule has found, so what is left to find out is how the
layer's and the attention's forward put them together: a small copy of the layer is run, and has to agree with the
op's reference.  At each call the op serves what it can; the rest goes through the layer's own forward, whose parts
are swapped one by one as well, with the reason on record (llmkern/swap/decoder_forward.py).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern.dispatch import implementation
from llmkern.integrations.transformers.attention import INTERFACE
from llmkern.swap.decoder_forward import LINEARS, OP, DecoderParts, forward
from llmkern.swap.decoder_stack import FORGETTING
from llmkern.swap.derive import as_before, is_own
from llmkern.swap.guard import UNSEEN, Part, Path, below, noted
from llmkern.swap.layer_probe import FAR_POSITION, Asked, Computed, NotAlike, Past, differs, run, small_copy
from llmkern.swap.match import PROBE_SCALE, Match, agrees, linear_like, remembered
from llmkern.swap.observe import aside
from llmkern.swap.rules import attention as attention_rule
from llmkern.swap.rules import mlp as mlp_rule
from llmkern.swap.rules import norms as norms_rule
from llmkern.swap.rules import rope as rope_rule
from llmkern.swap.surroundings import classes_within
from llmkern.swap.whole_layer import LinearPart, NormPart, whole_class

SWITCHES = ("attention", "norms", "mlp", "rope")

_HIDDEN, _INNER, _BATCH, _LENGTH = 6, 10, 2, 3  # of the probe
_NORMS = ("input_norm", "post_norm", "q_norm", "k_norm")


class _Probe(NamedTuple):
    """One run of a small copy.

    how: a phrase for the sentence.  spread: of the values; queries and keys as large would leave softmax to rounding.
    past: tokens in the cache, None for no cache.  first: position of the first token.
    """

    how: str
    dtype: torch.dtype = torch.float32
    spread: float = 1.0
    past: int | None = None
    first: int = 0


_NEAR = _Probe("on small values")
_PROBES = (
    _Probe("on large values", spread=PROBE_SCALE),
    _Probe("in float64, after a past, at positions from a million on", torch.float64, past=4, first=FAR_POSITION),
)


def find(module: nn.Module) -> Match | None:
    if implementation(OP, "cpu").backend.missing is not None or not is_own(nn.Linear, "forward"):
        return None
    known = _parts_of(module)
    if known is None:
        return None
    layer, granted = known
    across = module._modules[layer.attention].o_proj.in_features  # type: ignore[union-attr]
    key = (classes_within(module), layer, across)
    return remembered(key, module, partial(_recognise, module, layer, granted))


def _recognise(module: nn.Module, layer: DecoderParts, granted: tuple[Part, ...]) -> Match:
    first, second, *heads = layer.norms
    reasons = []
    for norms in ((first, second, *heads), (second, first, *heads)):
        try:
            passed, notes = _probed(module, replace(layer, norms=norms))
        except NotAlike as error:
            reasons.append(str(error))
        else:
            cls = whole_class(module, getattr(module, layer.attention), forward, passed, notes + granted, *FORGETTING)
            return Match("layer", OP, cls=cls, sample=partial(_sample, passed), is_whole=True)
    return Match("layer", OP, reasons[0], is_whole=True)


def _parts_of(module: nn.Module) -> tuple[DecoderParts, tuple[Part, ...]] | None:
    """The parts, where they are those of a decoder layer, and what they take for granted; what the probe finds out is
    still open."""
    children = {name: as_before(child) for name, child in module._modules.items() if child is not None}
    if not 4 <= len(children) <= 8 or any(p is not None for p in module._parameters.values()):
        return None
    kinds: dict[str, list[str]] = {"norm": [], "attention": [], "mlp": [], "none": [], "other": []}
    for name, child in children.items():
        kinds[_kind(child)].append(name)
    if [len(kinds[kind]) for kind in ("norm", "attention", "mlp", "other")] != [2, 1, 1, 0]:
        return None
    (attention,), (mlp,) = kinds["attention"], kinds["mlp"]
    within: Any = children[attention]
    form = rope_rule.form_of(children[attention])
    linears = _attention_linears(attention, within)
    heads = _head_norms(attention, within)
    if form is None or form.per_pair or linears is None or heads is None:
        return None
    norms = [_norm((name,), children[name]) for name in kinds["norm"]] + heads
    if len({(norm.eps, norm.offset) for norm in norms}) != 1:
        return None
    gated: Any = mlp_rule.find(children[mlp])
    linears = (*linears, *_mlp_linears(mlp, children[mlp], gated.cls))
    granted = [*[norm.granted for norm in norms], below((mlp,), gated.cls._llmkern_guard.parts)]
    layer = DecoderParts(
        attention=attention,
        norms=(*[norm.part for norm in norms], *[None] * (4 - len(norms))),
        linears=linears,
        norm_offset=norms[0].offset,
        head_dim=within.head_dim,
        kv_heads=_key_rows(within) // within.head_dim,
        interleaved=form.interleaved,
        activation=gated.cls._llmkern_activation,
    )
    return layer, tuple(chain.from_iterable(granted))


def _kind(child: nn.Module) -> str:
    """Which part of a layer the child is; "none" for one that does nothing outside training."""
    if isinstance(child, (nn.Dropout, nn.Identity)):
        return "none"
    for kind, rule in (("norm", norms_rule), ("attention", attention_rule), ("mlp", mlp_rule)):
        found = rule.find(child)
        if found is not None:
            return "other" if found.reason or found.op == "layer_norm" else kind
    return "other"


class _Norm(NamedTuple):
    """A norm with its eps and its offset as numbers."""

    part: NormPart
    eps: float
    offset: float
    granted: tuple[Part, ...]


def _norm(path: Path, norm: nn.Module) -> _Norm:
    found: Any = norms_rule.find(norm)
    weight, bias, eps, offset = found.cls._llmkern_norm
    number = norms_rule.eps_of(norm, eps, torch.empty(0))
    return _Norm(NormPart(path, weight, bias, eps), number, offset, below(path, found.cls._llmkern_guard.parts))


def _head_norms(name: str, attention: nn.Module) -> list[_Norm] | None:
    """Those of queries and keys, [] where there are none; None where the attention has other children."""
    others = {n: as_before(c) for n, c in attention._modules.items() if c is not None and not linear_like(c)}
    if not others:
        return []
    if others.keys() != {"q_norm", "k_norm"} or any(_kind(child) != "norm" for child in others.values()):
        return None
    heads = [_norm((name, part), others[part]) for part in ("q_norm", "k_norm")]
    held = [others[norm.part.path[-1]]._parameters[norm.part.weight] for norm in heads]
    sizes = {None if weight is None else weight.numel() for weight in held}
    return heads if sizes == {attention.head_dim} else None


def _key_rows(attention: Any) -> int:
    if "k_proj" in attention._modules:
        return int(attention.k_proj.out_features)
    return int(attention.qkv_proj.out_features - attention.o_proj.in_features) // 2


def _attention_linears(name: str, attention: Any) -> tuple[LinearPart, ...] | None:
    """q, k, v and o of the op."""
    linears = {n for n, child in attention._modules.items() if linear_like(child)}
    heads = isinstance(getattr(attention, "head_dim", None), int) and getattr(attention, "is_causal", True)
    if not heads or any(p is not None for p in attention._parameters.values()):
        return None
    if linears == {"q_proj", "k_proj", "v_proj", "o_proj"}:
        return tuple([LinearPart((name, f"{role}_proj")) for role in "qkvo"])
    if linears != {"qkv_proj", "o_proj"}:
        return None
    q = int(attention.o_proj.in_features)
    kv = _key_rows(attention)
    packed = (name, "qkv_proj")
    count = q + 2 * kv
    rows = ((0, q, count), (q, q + kv, count), (q + kv, count, count))
    return (*[LinearPart(packed, each) for each in rows], LinearPart((name, "o_proj")))


def _mlp_linears(name: str, mlp: nn.Module, cls: Any) -> tuple[LinearPart, ...]:
    """gate, up and down of the op."""
    *into, down = cls._llmkern_linears
    gate_and_up = [LinearPart((name, linear)) for linear in into]
    if len(into) == 1:
        half = int(mlp._modules[into[0]].out_features) // 2  # type: ignore[union-attr,arg-type]
        rows = ((0, half, 2 * half), (half, 2 * half, 2 * half))
        gate_and_up = [LinearPart((name, into[0]), each) for each in rows]
    return (*(gate_and_up if cls._llmkern_gate_first else reversed(gate_and_up)), LinearPart((name, down)))


def _probed(module: nn.Module, layer: DecoderParts) -> tuple[DecoderParts, tuple[Part, ...]]:
    """The layer with what its attention asks for, and what its forward takes for granted.

    Raises `NotAlike` where a small copy of it does not compute what the op does, near and far."""
    granted: tuple[Part, ...] = ()
    found = replace(layer, sm_scale=math.nan)
    for probe in (_NEAR, *_PROBES):
        asked = Asked()
        call = _small_call(layer, module._modules[layer.attention], probe)
        k, v = call["k_cache"], call["v_cache"]
        past = None if probe.past is None else Past(k[:, :, : probe.past].clone(), v[:, :, : probe.past].clone())
        rotations = rope_rule.rotary_functions(type(as_before(getattr(module, layer.attention))).forward)
        globals_ = {INTERFACE: asked} | {name: aside(function) for name, function in rotations.items()}
        copy = small_copy(module, _stand_ins(layer, call), (layer.attention,), globals_)
        out = run(
            copy,
            probe.how,
            asked,
            call["hidden"],
            attention_mask=call["mask"],
            position_ids=torch.arange(_LENGTH)[None] + probe.first,
            past_key_values=past,
            use_cache=past is not None,
            position_embeddings=(call["cos"], call["sin"]),
        )
        scale, window = _asked_for(asked)
        if not agrees(out, implementation(OP, "reference").fn(**call, sm_scale=scale)):
            raise differs(probe.how)
        if past is not None and past.calls != 1:
            raise NotAlike(f"its attention updates its cache {past.calls} times")
        notes = noted(copy)
        if notes is None:
            raise NotAlike(UNSEEN)
        if probe is _NEAR:
            found = replace(layer, sm_scale=scale, window=window)
        elif (scale, window) != (found.sm_scale, found.window):
            raise NotAlike(f"its attention asks for another scale or window {probe.how}")
        if past is not None:  # its place in the cache is read at each call, and differs from layer to layer
            notes = tuple(
                [part._replace(reads=tuple([r for r in part.reads if r.name != "layer_idx"])) for part in notes]
            )
        granted += notes
    return found, granted


def _asked_for(asked: Asked) -> tuple[float, int]:
    """Scale and window that the attention asks for; `NotAlike` where it asks for more."""
    others = asked.arguments.keys() - {"scaling", "sliding_window", "is_causal"}
    if others or asked.arguments.get("is_causal", True) is not True:
        raise NotAlike(f"its attention asks for {', '.join(sorted(others)) or 'no causal mask'}")
    scale, window = asked.arguments.get("scaling"), asked.arguments.get("sliding_window", -1)
    if not isinstance(scale, float) or not isinstance(window, int):
        raise NotAlike("its attention asks for no scale, or for one that is no number")
    return scale, window


def _small_call(layer: DecoderParts, attention: Any, probe: _Probe) -> dict[str, Any]:
    """The op's call for the probe but for sm_scale: the layer's heads, and a small hidden size."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(probe.dtype)

    across, dim = attention.o_proj.in_features, layer.head_dim
    keys = layer.kv_heads * dim
    sizes = {"q": across, "k": keys, "v": keys, "o": _HIDDEN, "gate": _INNER, "up": _INNER, "down": _HIDDEN}
    into = {"o": across, "down": _INNER}
    held, past = (None, 0) if probe.past is None else (probe.past + _LENGTH, probe.past)
    call: dict[str, Any] = {"k_cache_scale": None, "v_cache_scale": None}
    for name in ("k_cache", "v_cache"):
        call[name] = None if held is None else randn(_BATCH, layer.kv_heads, held, dim)
    for name, size in sizes.items():
        columns = into.get(name, _HIDDEN)
        call |= {f"{name}_weight": randn(size, columns) * columns**-0.5, f"{name}_scale": None}
        call[f"{name}_bias"] = randn(size)
    for name, norm in zip(_NORMS, layer.norms, strict=True):
        call[name] = None if norm is None else randn(dim if name in ("q_norm", "k_norm") else _HIDDEN)
    call["v_weight"] *= probe.spread
    mask = torch.full((_LENGTH, past + _LENGTH), -math.inf, dtype=probe.dtype).triu(past + 1)[None, None]
    return call | {
        "hidden": randn(_BATCH, _LENGTH, _HIDDEN),
        "cos": randn(1, _LENGTH, dim),
        "sin": randn(1, _LENGTH, dim),
        "past": past,
        "mask": mask,
        "head_dim": dim,
        "eps": 1e-5,
        "norm_offset": layer.norm_offset,
        "interleaved": layer.interleaved,
        "window": -1,
        "softcap": 0.0,
        "activation": layer.activation,
        "scheme": "w8a8",
    }


def _stand_ins(layer: DecoderParts, call: dict[str, Any]) -> dict[tuple[str, ...], nn.Module]:
    """The norms, the attention's linear layers and the MLP, with the call's parameters."""
    made: dict[tuple[str, ...], nn.Module] = {}
    for name, norm in zip(_NORMS, layer.norms, strict=True):
        if norm is not None:
            made[norm.path] = Computed(partial(_normed, call, call[name]))
    by_path: dict[tuple[str, ...], list[str]] = {}
    for name, part in zip(LINEARS[:4], layer.linears[:4], strict=True):
        by_path.setdefault(part.path, []).append(name)
    for path, names in by_path.items():
        weight, bias = (torch.cat([call[f"{name}_{part}"] for name in names]) for part in ("weight", "bias"))
        made[path] = Computed(partial(F.linear, weight=weight, bias=bias))
    made[layer.linears[-1].path[:1]] = Computed(partial(_gated, call))
    return made


def _normed(call: dict[str, Any], weight: Tensor, x: Tensor) -> Tensor:
    y: Tensor = implementation("rms_norm", "reference").fn(
        x=x, weight=weight, bias=None, eps=call["eps"], weight_offset=call["norm_offset"]
    )
    return y


def _gated(call: dict[str, Any], x: Tensor) -> Tensor:
    gate, up = (F.linear(x, call[f"{name}_weight"], call[f"{name}_bias"]) for name in ("gate", "up"))
    function = mlp_rule.function_of(call["activation"])
    return F.linear(function(gate) * up, call["down_weight"], call["down_bias"])


def _sample(layer: DecoderParts, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """A small call with the layer's head dimension."""
    dim = layer.head_dim
    made = {name: torch.zeros(dim, dim, dtype=dtype, device=device) for name in LINEARS}
    norm = torch.zeros(dim, dtype=dtype, device=device)
    angles = torch.zeros(1, 1, dim, dtype=dtype, device=device)
    call: dict[str, Any] = {"hidden": angles, "cos": angles, "sin": angles, "past": 0, "mask": None}
    call |= {name: None for name in ("k_cache", "v_cache", "k_cache_scale", "v_cache_scale")}
    call |= {name: None if part is None else norm for name, part in zip(_NORMS, layer.norms, strict=True)}
    for name, weight in made.items():
        call |= {f"{name}_weight": weight, f"{name}_scale": None, f"{name}_bias": None}
    return call | {
        "head_dim": dim,
        "eps": 1e-5,
        "norm_offset": layer.norm_offset,
        "interleaved": layer.interleaved,
        "sm_scale": layer.sm_scale,
        "window": layer.window,
        "softcap": 0.0,
        "activation": layer.activation,
        "scheme": "w8a8",
    }
