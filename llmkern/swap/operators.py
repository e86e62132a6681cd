"""Track the operators between a layer's parts: their effect on element identities, products and sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from llmkern.programs.program import Place
from llmkern.swap.track import Arranged, Refused, Term, Value, in_heads, uniform

if TYPE_CHECKING:
    from llmkern.swap.record import Recorder

__all__ = ["FACTORIES", "HANDLERS", "ZEROS", "tensors_in"]

# Operators that move elements without changing them, so that identities follow numbers.
_MOVES = frozenset(
    ("alias", "cat", "clone", "detach", "expand", "permute", "repeat", "select", "slice", "split")
    + ("split_with_sizes", "squeeze", "stack", "t", "transpose", "unbind", "unsqueeze")
)
_RESHAPES = frozenset({"_reshape_alias", "_unsafe_view", "reshape", "unflatten", "view"})
_CONVERSIONS = frozenset({"_to_copy"})  # a part that is given another dtype than the layer's refuses it
_ACTIVATIONS = {"gelu": "gelu", "silu": "silu", "relu": "relu"}


class Scores(NamedTuple):
    """Attention scores under construction: queries and keys [B*heads, tokens, D], and what was added."""

    q: Arranged
    k: Arranged
    scale: float
    added: tuple[Value, ...] = ()


def tensors_in(args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda x: found.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
    return found


# Each takes the recorder, the overload, the result, and the operator's arguments; gives what the result holds.


def _move(recorder: Recorder, func: Any, out: Any, *args: Any, **kwargs: Any) -> Any:
    kwargs.pop("memory_format", None)
    held = [recorder.values.held(x) for x in tensors_in(args, kwargs)]
    if None in held:
        raise Refused("between its parts its forward joins a tensor of its own making")
    factors = {h.factor for h in held if h is not None and not isinstance(h.factor, Tensor)}
    several = len(factors) > 1 or any(h is not None and isinstance(h.factor, Tensor) for h in held)

    def identities(x: Any) -> Any:
        found = recorder.values.held(x) if isinstance(x, Tensor) else None
        return x if found is None else found.identities

    def factor(x: Any) -> Any:
        found = recorder.values.held(x) if isinstance(x, Tensor) else None
        if found is None:
            return x
        return found.factor if isinstance(found.factor, Tensor) else torch.full(x.shape, found.factor)

    moved = func(*tree_map(identities, args), **kwargs)
    moved_factors = func(*tree_map(factor, args), **kwargs) if several else None
    if isinstance(moved, Tensor):
        return Arranged(moved, factors.pop() if moved_factors is None else moved_factors)
    if moved_factors is None:
        moved_factors = [factors.pop()] * len(moved)
    return [Arranged(m, f) for m, f in zip(moved, moved_factors, strict=True)]


def _index(recorder: Recorder, func: Any, out: Tensor, x: Tensor, indices: list[Tensor | None]) -> Arranged:
    """Index a tensor by numbers that are literal in the source."""
    if any(i is not None and recorder.kind(i) != "literal" for i in indices):
        raise Refused("between its parts its forward computes index")
    held = recorder.arranged(x, x)
    factor = func(held.factor, indices) if isinstance(held.factor, Tensor) else held.factor
    return Arranged(func(held.identities, indices), factor)


def _reshape(recorder: Recorder, func: Any, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Arranged:
    held = recorder.arranged(x, x)
    factor = held.factor.reshape(out.shape) if isinstance(held.factor, Tensor) else held.factor
    return Arranged(held.identities.reshape(out.shape), factor)


def _convert(recorder: Recorder, func: Any, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Arranged:
    if not out.is_floating_point() or not x.is_floating_point():
        raise Refused("between its parts its forward computes _to_copy")
    return recorder.arranged(x, x)


def _times(recorder: Recorder, x: Tensor, number: Any, out: Tensor) -> Arranged:
    held = recorder.arranged(x, out)
    number = float(number)
    return Arranged(held.identities, held.factor * number)


def _mul(recorder: Recorder, func: Any, out: Tensor, a: Any, b: Any) -> Any:
    kinds = recorder.kind(a), recorder.kind(b)
    if "number" in kinds:
        return _times(recorder, *((b, a) if kinds[0] == "number" else (a, b)), out)
    if "table" in kinds:
        rows, table = (b, a) if kinds[0] == "table" else (a, b)
        if recorder.kind(rows) != "rows":
            raise Refused("between its parts its forward computes mul of a table")
        term = Term(recorder.arranged(rows, out), recorder.arranged(table, out))
        return recorder.values.new(out.shape, "terms", terms=(term,))
    if "parameter" in kinds:
        rows, parameter = (b, a) if kinds[0] == "parameter" else (a, b)
        value, places = recorder.rows_of(rows, "mul")
        other = recorder.arranged(parameter, out)
        found = recorder.values.within(other)
        assert found is not None
        if found.numel != value.shape[-1] or not torch.equal(other.identities - found.first, places % found.numel):
            raise Refused("between its parts its forward computes mul with a parameter of another shape")
        (result,) = recorder.node("scale", [value], [value.shape], by=Place(found.name, tensor=True))
        return Arranged(places + result.first)
    if kinds != ("rows", "rows"):
        raise Refused("between its parts its forward computes mul")
    return _both(recorder, "mul", a, b, out)


def _both(recorder: Recorder, op: str, a: Tensor, b: Tensor, out: Tensor) -> Arranged:
    """Apply an elementwise operator to two values."""
    (left, places), (right, others) = recorder.rows_of(a, op), recorder.rows_of(b, op)
    if left.shape != right.shape or places.shape != others.shape or not torch.equal(places, others):
        raise Refused(f"between its parts its forward computes {op} of values that do not lie alike")
    (result,) = recorder.node(op, [left, right], [left.shape])
    return Arranged(places + result.first)


def _div(recorder: Recorder, func: Any, out: Tensor, a: Any, b: Any) -> Any:
    if recorder.kind(b) != "number":
        raise Refused("between its parts its forward computes div")
    return _times(recorder, a, 1.0 / float(b), out)


def _neg(recorder: Recorder, func: Any, out: Tensor, x: Tensor) -> Any:
    return _times(recorder, x, -1.0, out)


def _add(recorder: Recorder, func: Any, out: Tensor, a: Any, b: Any, alpha: float = 1.0, sign: float = 1.0) -> Any:
    kinds = recorder.kind(a), recorder.kind(b)
    if kinds == ("terms", "terms"):
        terms = (*_terms(recorder, a, 1.0), *_terms(recorder, b, alpha * sign))
        return recorder.values.new(out.shape, "terms", terms=terms)
    if "scores" in kinds and alpha * sign == 1:
        return _onto_scores(recorder, *((a, b) if kinds[0] == "scores" else (b, a)), out)
    if kinds != ("rows", "rows"):
        raise Refused(f"between its parts its forward computes {func._schema.name.removeprefix('aten::')}")
    if alpha * sign != 1:
        recorder.values.hold(scaled := b.detach(), _times(recorder, b, alpha * sign, b))
        b = scaled
    return _both(recorder, "add", a, b, out)


def _sub(recorder: Recorder, func: Any, out: Tensor, a: Any, b: Any, alpha: float = 1.0) -> Any:
    return _add(recorder, func, out, a, b, alpha, -1.0)


def _terms(recorder: Recorder, x: Tensor, sign: float) -> tuple[Term, ...]:
    held = recorder.arranged(x, x)
    value = recorder.values.within(held)
    assert value is not None
    places = held.identities - value.first

    def taken(arranged: Arranged, factor: float | Tensor) -> Arranged:
        own = arranged.factor.flatten()[places] if isinstance(arranged.factor, Tensor) else arranged.factor
        return Arranged(arranged.identities.flatten()[places], own * factor)

    return tuple([Term(taken(t.rows, held.factor * sign), taken(t.table, 1.0)) for t in value.terms])


def _bmm(recorder: Recorder, func: Any, out: Tensor, a: Tensor, b: Tensor) -> Any:
    kinds = recorder.kind(a), recorder.kind(b)
    if kinds[0] == "weights" and kinds[1] == "rows":
        return _weighted(recorder, a, b, out)
    if set(kinds) - {"rows", "terms"}:
        raise Refused("between its parts its forward computes bmm")
    q, k = recorder.arranged(a, a), recorder.arranged(b, b)
    factor = k.factor.mT if isinstance(k.factor, Tensor) else k.factor
    scores = Scores(q, Arranged(k.identities.mT, factor), 1.0)
    return recorder.values.new(out.shape, "scores", about=scores)


def _baddbmm(
    recorder: Recorder, func: Any, out: Tensor, x: Tensor, a: Tensor, b: Tensor, beta: float = 1.0, alpha: float = 1.0
) -> Any:
    scores = _bmm(recorder, func, out, a, b)
    if scores.kind != "scores" or beta != 1:
        raise Refused("between its parts its forward computes baddbmm")
    added = recorder.values.whole(recorder.arranged(x, x), "bias")
    if added is None:
        raise Refused("between its parts its forward adds to the scores what the layer is not given")
    return recorder.values.new(out.shape, "scores", about=scores.about._replace(scale=alpha, added=(added,)))


def _scores_of(recorder: Recorder, x: Tensor) -> Scores:
    held = recorder.arranged(x, x)
    value = recorder.values.within(held)
    if value is None or not torch.equal(held.identities.flatten(), value.identities().flatten()):
        raise Refused("its attention takes some scores, or in another order")
    scores: Scores = value.about
    factor = uniform(held.factor)
    if factor != 1 and scores.added:
        raise Refused("its attention multiplies what was added to the scores")
    return scores._replace(scale=scores.scale * factor)


def _onto_scores(recorder: Recorder, x: Tensor, other: Any, out: Tensor) -> Value:
    scores = _scores_of(recorder, x)
    kind = recorder.kind(other)
    added = recorder.values.whole(recorder.arranged(other, other), kind) if kind in ("mask", "bias") else None
    if added is None or any(known.kind == kind for known in scores.added):
        raise Refused("between its parts its forward adds to the scores what the layer is not given")
    return recorder.values.new(out.shape, "scores", about=scores._replace(added=(*scores.added, added)))


def _softmax(recorder: Recorder, func: Any, out: Tensor, x: Tensor, dim: int, half_to_float: bool = False) -> Value:
    if recorder.kind(x) != "scores" or dim % x.dim() != x.dim() - 1:
        raise Refused("between its parts its forward computes softmax")
    return recorder.values.new(out.shape, "weights", about=_scores_of(recorder, x))


def _weighted(recorder: Recorder, weights: Tensor, v: Tensor, out: Tensor) -> Arranged:
    """Recognize attention that is written out: scores, softmax, and the product with the values."""
    scores = _scores_of(recorder, weights)
    batch = recorder.shape[0]

    def by_head(arranged: Arranged) -> Arranged:
        unflat = [batch, arranged.identities.shape[0] // batch]
        factor = arranged.factor.unflatten(0, unflat) if isinstance(arranged.factor, Tensor) else arranged.factor
        return Arranged(arranged.identities.unflatten(0, unflat), factor)

    q = recorder.heads_held(by_head(scores.q), "queries")
    k = recorder.heads_held(by_head(scores.k), "keys")
    values = recorder.heads_held(by_head(recorder.arranged(v, v)), "values")
    added = {value.kind: value for value in scores.added}
    operands = [q[0], k[0], recorder.scaled(values), *([added["mask"]] if "mask" in added else [])]
    shape = (batch, out.shape[1], out.shape[0] // batch * out.shape[2])
    options: dict[str, Any] = {"dim": scores.q.identities.shape[-1], "scale": scores.scale * q[2] * k[2]}
    (result,) = recorder.node("attention", operands, [shape], **options, bias=added.get("bias"))
    held = in_heads(result, (batch, out.shape[0] // batch, out.shape[1], out.shape[2]))
    return Arranged(held.identities.flatten(0, 1))


def _activation(recorder: Recorder, func: Any, out: Tensor, x: Tensor, approximate: str = "none") -> Arranged:
    name = func._schema.name.removeprefix("aten::")
    recorder.pointwise("gelu_tanh" if approximate == "tanh" else _ACTIVATIONS[name], x, out)
    found = recorder.values.held(out)
    assert found is not None
    return found


def _gather(recorder: Recorder, func: Any, out: Tensor, x: Tensor, dim: int, index: Tensor) -> Arranged:
    """Look up rows of a table of sines and cosines, side by side, by the tokens' positions.  They become the program's
    inputs "sin" and "cos", which its caller looks up.
    """
    table = recorder.values.within(recorder.arranged(x, x))
    if dim != 1 or table is None or table.kind != "lookup" or recorder.kind(index) != "positions":
        raise Refused("between its parts its forward computes gather")
    in_order = Arranged(recorder.arranged(x, x).identities[:1])
    if not torch.equal(in_order.identities.flatten(), table.identities().flatten()):
        raise Refused("between its parts its forward computes gather")
    if recorder.values.whole(recorder.arranged(index, index), "positions") is None:
        raise Refused("its positions are not the ones that the layer is given")
    recorder.lookup = table.name
    halves = []
    for name, numbers in zip(("sin", "cos"), out.chunk(2, -1), strict=True):
        halves.append(recorder.values.new(numbers.shape, "table", name=name))
        recorder.given_later[name] = numbers.contiguous()
    return Arranged(torch.cat([half.identities() for half in halves], -1))


def _clamp(
    recorder: Recorder, func: Any, out: Tensor, x: Tensor, min: float | None = None, max: float | None = None
) -> Arranged:
    limits = {"low": min, "high": max}
    if any(isinstance(limit, Tensor) for limit in limits.values()):
        raise Refused("between its parts its forward computes clamp")
    recorder.pointwise("clamp", x, out, **{k: None if v is None else float(v) for k, v in limits.items()})
    found = recorder.values.held(out)
    assert found is not None
    return found


FACTORIES = frozenset(
    ("empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like")
)
ZEROS = frozenset({"new_zeros", "zeros", "zeros_like"})
HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_MOVES, _move),
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_CONVERSIONS, _convert),
    **dict.fromkeys(_ACTIVATIONS, _activation),
    "gather": _gather,
    "index": _index,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "add": _add,
    "sub": _sub,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "_softmax": _softmax,
    "clamp": _clamp,
}
