"""Run a program step by step: by the ops' definitions (`reference`), or through the dispatcher (`dispatched`).

    run(program, {"hidden": hidden, "cos": cos, "sin": sin, "mask": mask}, weights, cache)

With `dispatched` gradients, torch.compile, `explain` and every backend work as they do for the ops themselves; with
`reference` in float64 it judges the native executors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.dispatch import dispatch, implementation
from llmkern.programs.program import GATES, OPERATORS, Place, Program, Step

__all__ = [
    "ACTIVATION_FUNCTIONS",
    "Cache",
    "Call",
    "Experts",
    "Kept",
    "Weights",
    "activated",
    "attend",
    "dispatched",
    "mixed",
    "reference",
    "routed",
    "run",
]

Call = Callable[..., Any]
Values = Mapping[str, Tensor | None]

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x).square(),
}


class Weights(Protocol):
    """Source of the parameters at a program's places, for one layer."""

    def linear(self, path: str, x: Tensor, call: Call) -> Tensor:
        """Return x · weightᵀ + bias, with all rows of the linear layer, in x's dtype (a router's x may be fp32)."""

    def norm(self, path: str) -> tuple[Tensor | None, Tensor | None]:
        """Return a norm's weight and bias."""

    def tensor(self, path: str) -> Tensor:
        """Return a single tensor."""


@runtime_checkable
class Experts(Protocol):
    """Weights that also have linear layers of experts."""

    def expert(self, path: str, number: int, x: Tensor, call: Call) -> Tensor:
        """Return x · weightᵀ + bias of one expert, with all rows of its weight."""


class Cache(Protocol):
    """Cache of one layer; keys and values are [B, Hkv, tokens, D]."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values at the end and return all of them."""

    def keep(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of an encoder's tokens and return them."""


@runtime_checkable
class Kept(Protocol):
    """A cache that holds keys and values of an encoder's tokens from an earlier call."""

    def kept(self) -> tuple[Tensor, Tensor]:
        """Return both of them, [B, Hkv, tokens, D]."""


def reference(op: str, **call: Any) -> Any:
    """Call the op's reference definition."""
    return implementation(op, "reference").fn(**call)


def dispatched(op: str, **call: Any) -> Any:
    """Call the op through the dispatcher, on whichever backend serves it."""
    return dispatch(op, **call)


def run(
    program: Program, inputs: Values, weights: Weights, cache: Cache | None = None, call: Call = reference
) -> Tensor:
    """Run the program on these inputs; return its result, [B, S, columns] like the hidden states.

    inputs: by the names in the program's head; an optional one may be None, and so may an encoder's tokens whose keys
        and values the cache has kept (`Kept`).
    cache: of this layer; without one `append` and `keep` give what they are given.
    """
    known: dict[str, Any] = dict(inputs)
    layer = _Layer(program, weights, cache, call)
    for step in program.steps:
        read = [known[name] for name in step.reads()]
        if read[0] is None and step.op != "keep":  # made of what was not given: only `keep` does without
            known.update(dict.fromkeys(step.results))
            continue
        results = getattr(layer, step.op, layer.activation)(step, *read)
        known.update(zip(step.results, results if isinstance(results, tuple) else (results,), strict=True))
    out: Tensor = known[program.result]
    return out


class _Layer:
    """Operators of `OPERATORS`; each method takes its step and the values that the step reads."""

    def __init__(self, program: Program, weights: Weights, cache: Cache | None, call: Call) -> None:
        self.program, self.weights, self.cache, self.call = program, weights, cache, call

    def rms_norm(self, step: Step, x: Tensor) -> Tensor:
        weight, bias = self.weights.norm(step.places[0].path)
        offset = step.option("offset", 0.0)
        normed: Tensor = self.call(
            "rms_norm", x=_per_head(x, step), weight=weight, bias=bias, eps=step.option("eps"), weight_offset=offset
        )
        return normed.reshape(x.shape)

    def layer_norm(self, step: Step, x: Tensor) -> Tensor:
        weight, bias = self.weights.norm(step.places[0].path)
        if weight is not None and (offset := _number(step, "offset")) is not None:
            weight = weight + offset
        normed: Tensor = self.call("layer_norm", x=_per_head(x, step), weight=weight, bias=bias, eps=step.option("eps"))
        return normed.reshape(x.shape)

    def add_rms_norm(self, step: Step, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.rms_norm(step, total), total

    def add_layer_norm(self, step: Step, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.layer_norm(step, total), total

    def linear(self, step: Step, x: Tensor, residual: Tensor | None = None) -> Any:
        products: dict[str, Tensor] = {}
        found = []
        for place in step.places:
            if place.path not in products:
                products[place.path] = self.weights.linear(place.path, x, self.call)
            found.append(_rows(products[place.path], place))
        activation = step.option("activation")
        if activation in GATES:
            found = [activated(GATES[str(activation)], found[0], self.call) * found[1]]
        elif activation is not None:
            found = [activated(str(activation), y, self.call) for y in found]
        if (multiplier := _number(step, "multiplier")) is not None:
            found = [y * multiplier for y in found]
        if residual is not None:
            found = [residual + y for y in found]
        return tuple(found)

    def route(self, step: Step, x: Tensor) -> Tensor:
        place, correction = step.places[0], step.option("correction")
        rows = x.float() if step.option("wide") and x.dtype != torch.float64 else x
        logits = _rows(self.weights.linear(place.path, rows, self.call), place)
        added = self.weights.tensor(correction.path) if isinstance(correction, Place) else None
        return routed(step, logits, added).to(x.dtype)

    def experts(self, step: Step, x: Tensor, weights: Tensor) -> Tensor:
        if not isinstance(self.weights, Experts):
            raise ValueError(f"{step.places[0]}: the layer has no experts")
        return mixed(step, x, weights, self.weights, self.call)

    def rope(self, step: Step, *values: Tensor) -> Any:
        *rows, cos, sin = values
        dim = _whole(step, "dim")
        heads = [_heads(x, dim) for x in rows]
        if step.option("half"):
            cos, sin = [table[..., : table.shape[-1] // 2] for table in (cos, sin)]
        turned = self.call(
            "rope",
            q=heads[0],
            k=heads[-1],
            cos=cos,
            sin=sin,
            rotary_dim=dim if step.option("rotary") is None else _whole(step, "rotary"),
            interleaved=bool(step.option("interleaved", False)),
        )
        return tuple([_tokens(x) for x in turned[: len(rows)]])

    def append(self, step: Step, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.cache is None:
            return k, v
        times = int(step.option("repeat", 1))  # type: ignore[arg-type]
        keys, values = [x.repeat_interleave(times, 1) if times > 1 else x for x in self.cached(step, k, v)]
        return self.cache.append(keys, values)

    def keep(self, step: Step, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor]:
        if k is None or v is None:
            if not isinstance(self.cache, Kept):
                raise ValueError(f"{step.values[0]} and {step.values[1]} are not given, and no cache has kept them")
            return self.cache.kept()
        return (k, v) if self.cache is None else self.cache.keep(*self.cached(step, k, v))

    def cached(self, step: Step, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Reshape keys and values for a cache: heads are as wide as the attention that reads them says."""
        later = self.program.steps[self.program.steps.index(step) :]
        reader = next(s for s in later if s.op == "attention" and s.values[1] == step.results[0])
        heads = _heads(k, _whole(reader, "dim"))
        return heads, _heads(v, v.shape[-1] // heads.shape[1])

    def attention(self, step: Step, q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> Tensor:
        mask = others[0] if len(step.values) == 4 else None
        bias = others[-1] if step.option("bias") is not None else None
        dim = _whole(step, "dim")
        q, k = _heads(q, dim), _heads(k, dim)
        v = _heads(v, v.shape[-1] // k.shape[1])
        slopes, sinks = step.option("slopes"), step.option("sinks")
        if isinstance(slopes, Place):
            steps = torch.arange(1 - k.shape[2], 1, device=q.device, dtype=torch.float32)
            bias = (self.weights.tensor(slopes.path).float()[:, None, None] * steps)[None].to(q.dtype)
        out = attend(
            q,
            k,
            v,
            mask,
            scale=step.option("scale"),
            causal=bool(step.option("causal", False)),
            window=step.option("window"),
            softcap=step.option("softcap", 0.0),
            sinks=self.weights.tensor(sinks.path) if isinstance(sinks, Place) else None,
            bias=bias,
            call=self.call,
        )
        return _tokens(out)

    def add(self, step: Step, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def mul(self, step: Step, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def scale(self, step: Step, x: Tensor) -> Tensor:
        by = step.option("by")
        return x * (self.weights.tensor(by.path) if isinstance(by, Place) else (_number(step, "by") or 0.0))

    def clamp(self, step: Step, x: Tensor) -> Tensor:
        return x.clamp(_number(step, "low"), _number(step, "high"))

    def activation(self, step: Step, x: Tensor) -> Tensor:
        return activated(step.op, x, self.call)


def activated(kind: str, x: Tensor, call: Call) -> Tensor:
    """Return one of `ACTIVATIONS` of x."""
    if kind in ("gelu", "gelu_tanh"):
        y: Tensor = call("gelu", x=x, approximate="tanh" if kind == "gelu_tanh" else "none")
        return y
    wide = x if x.dtype == torch.float64 else x.float()
    return ACTIVATION_FUNCTIONS[kind](wide).to(x.dtype)


def mixed(step: Step, x: Tensor, weights: Tensor, experts: Experts, call: Call = reference) -> Tensor:
    """Return the result of an `experts` step for x [..., columns] and the experts' weights [..., experts]."""

    def output(number: int) -> Tensor:
        def linear(place: Place, x: Tensor) -> Tensor:
            return _rows(experts.expert(place.path, number, x, call), place)

        *inner, down = step.places
        made = [linear(place, x) for place in inner]
        limit, offset = _number(step, "limit"), _number(step, "offset")
        if limit is not None:
            made = [made[0].clamp(max=limit), *[up.clamp(-limit, limit) for up in made[1:]]]
        kind = str(step.option("activation"))
        y = activated(GATES.get(kind, kind), made[0], call)
        for up in made[1:]:
            y = y * (up if offset is None else up + offset)
        return linear(down, y)

    total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
    for number in range(weights.shape[-1]):
        weight = weights[..., number : number + 1]
        total = total + torch.where(weight != 0, weight * output(number), 0)
    return total.to(x.dtype)


def routed(step: Step, logits: Tensor, correction: Tensor | None) -> Tensor:
    """The weights of a `route` step whose linear layer gives these logits [..., experts]; in fp32 or fp64.

    Sorting is stable: of experts that are equally good the first is chosen, and NaN before numbers.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    scores = logits.sigmoid() if step.option("sigmoid") else logits.softmax(-1)
    keys = scores if step.option("sigmoid") else logits  # a softmax's order, with fewer ties
    if correction is not None:
        keys = scores + correction.to(scores.dtype)
    if step.option("groups") is not None:
        by_group = keys.unflatten(-1, (_whole(step, "groups"), -1))
        sums = by_group.topk(2, -1).values.sum(-1)
        kept = sums.argsort(dim=-1, descending=True, stable=True)[..., : _whole(step, "group_top")]
        outside = torch.ones_like(sums, dtype=torch.bool).scatter(-1, kept, False)
        keys = by_group.masked_fill(outside[..., None], -math.inf).flatten(-2)
    chosen = keys.argsort(dim=-1, descending=True, stable=True)[..., : _whole(step, "top")]
    most = scores.gather(-1, chosen)
    if step.option("normalized"):
        most = most / (most.sum(-1, keepdim=True) + (_number(step, "eps") or 0.0))
    return torch.zeros_like(scores).scatter(-1, chosen, most * (_number(step, "scale") or 1.0))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: Any,
    causal: bool = False,
    window: Any = None,
    softcap: Any = 0.0,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    call: Call = reference,
) -> Tensor:
    """The `attention` op as a program's step means it: a mask that is given says everything, and a bias is added.

    q, k, v: [B, heads, tokens, D].  Returns [B, heads, queries, columns of v]."""
    masked = mask is not None
    if bias is not None:
        if bias.dim() == 3 and bias.shape[0] == q.shape[0] * q.shape[1]:
            bias = bias.unflatten(0, (q.shape[0], q.shape[1]))
        bias = bias[..., : k.shape[2]].to(q.dtype)
        if mask is None:
            mask = bias.expand(-1, -1, q.shape[2], -1)
            if causal and q.shape[2] > 1:
                hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
                mask = mask.masked_fill(hidden.triu(k.shape[2] - q.shape[2] + 1), -math.inf)
        else:
            mask = torch.where(mask, bias, -math.inf) if mask.dtype == torch.bool else bias + mask
    causal = causal and not masked
    out, _ = call(
        "attention",
        q=q,
        k=k,
        v=v,
        attn_mask=mask,
        key_padding_mask=None,
        sinks=sinks,
        causal=causal,
        sm_scale=float(scale),
        window=[int(window) - 1, -1] if window is not None and causal else [-1, -1],
        softcap=float(softcap),
        return_lse=False,
    )
    attended: Tensor = out
    return attended


def _whole(step: Step, name: str) -> int:
    value = step.option(name)
    assert isinstance(value, int), OPERATORS[step.op]
    return value


def _number(step: Step, name: str) -> float | None:
    value = step.option(name)
    return value if isinstance(value, float) else None


def _per_head(x: Tensor, step: Step) -> Tensor:
    dim = step.option("dim")
    return x if dim is None else x.unflatten(-1, (-1, int(dim)))  # type: ignore[arg-type]


def _heads(x: Tensor, dim: int) -> Tensor:
    """Reshape [B, S, heads * dim] to [B, heads, S, dim]; 4-dimensional tensors (a whole cache's) are returned
    unchanged.
    """
    return x if x.dim() == 4 else x.unflatten(-1, (-1, dim)).transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """Undo `_heads`."""
    return x.transpose(1, 2).flatten(2)


def _rows(x: Tensor, place: Place) -> Tensor:
    if place.rows is None:
        return x
    begin, end, period = place.rows
    if not period:
        return x[..., begin:end]
    return x.unflatten(-1, (-1, period))[..., begin:end].flatten(-2)
