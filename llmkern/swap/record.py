"""Read a program from a layer's forward: one run in which every operator between the parts is seen.

Norms, linear layers, activations, the attention function and the cache are parts, which note that they are asked and
compute what they stand for.  Between them a forward may move elements (`llmkern.swap.track`), multiply by numbers, add
and multiply rows, turn heads by cosines and sines, or write attention out; all else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from llmkern.programs.program import Option, Place, Program, Step
from llmkern.programs.run import attend
from llmkern.swap.heads import heads
from llmkern.swap.observe import aside
from llmkern.swap.operators import FACTORIES, HANDLERS, ZEROS, tensors_in
from llmkern.swap.track import Arranged, Node, Refused, Value, Values, in_heads, uniform

__all__ = ["Recorder"]


class Recorder(TorchDispatchMode):
    """Record what a forward computes within the block.

    dtype: of the layer's rows.  shape: [B, S] of its hidden states.
    """

    def __init__(self, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        super().__init__()
        self.dtype, self.shape = dtype, shape
        self.values = Values()
        self.nodes: list[Node] = []
        self.reason = ""
        self.causal: set[bool] = set()  # what attention modules say of themselves
        self.lookup = ""  # the place of a table that the layer looks its cosines and sines up in
        self.given_later: dict[str, Tensor] = {}  # inputs that the forward makes itself
        self.made: list[tuple[str, Any, Any, Tensor]] = []  # biases: whose method made them, its arguments, and they

    def given(self, name: str, tensor: Tensor, kind: str) -> None:
        """Add an input of the program, or a parameter (kind "parameter", named by its path)."""
        self.values.hold(tensor, self.values.new(tensor.shape, kind, name=name))

    def given_heads(self, name: str, tensor: Tensor) -> None:
        """Add an input of the program whose rows have the shape [B, heads, tokens, D]."""
        self.values.hold(tensor, in_heads(self.values.new(_row_shape(tensor), "rows", name=name), tensor.shape))

    def refuse(self, reason: str) -> Refused:
        """Return the exception to raise; keeps the first reason, since a forward may catch exceptions raised inside
        it.
        """
        self.reason = self.reason or reason
        return Refused(reason)

    def node(
        self, op: str, values: list[Value], shapes: list[Any], places: list[Place] | None = None, **options: Any
    ) -> list[Value]:
        """Return the results of a new step: rows of these shapes."""
        node = Node(op, values, places or [], {k: v for k, v in options.items() if v is not None and v is not False})
        node.results = [self.values.new(shape, "rows", node=node) for shape in shapes]
        self.nodes.append(node)
        return list(node.results)

    # What parts ask for.  They run aside, where no mode is at work.

    def rows_of(self, tensor: Tensor, what: str) -> tuple[Value, Tensor]:
        """Return `Values.rows` for a tensor in the layer's dtype; a factor it was multiplied by becomes a step."""
        arranged = self.values.held(tensor)
        if arranged is None:
            raise self.refuse(f"{what} takes a tensor that the forward makes of nothing")
        if tensor.dtype != self.dtype:
            raise self.refuse("between its parts its forward computes _to_copy")
        try:
            value, places = self.values.rows(arranged, what)
            factor = uniform(arranged.factor)
        except Refused as error:
            raise self.refuse(str(error)) from None
        if factor != 1.0:
            (value,) = self.node("scale", [value], [value.shape], by=factor)
        return value, places

    def in_order(self, tensor: Tensor, what: str) -> Value:
        """Return the value all of whose rows the tensor holds, in order."""
        value, places = self.rows_of(tensor, what)
        if not torch.equal(places.flatten(), torch.arange(places.numel())):
            raise self.refuse(f"{what} takes rows or columns in another order")
        return value

    def linear(self, path: str, x: Tensor, out: Tensor) -> None:
        """Record that a linear layer was given x."""
        value = self.in_order(x, path)
        shape = (*value.shape[:-1], out.shape[-1])
        self.values.hold(out, self.node("linear", [value], [shape], [Place(path)])[0])

    def norm(self, op: str, path: str, x: Tensor, out: Tensor, eps: float, offset: float) -> None:
        """Record a norm over the last dimension."""
        value, places = self.rows_of(x, path)
        width = x.shape[-1]
        if not torch.equal(places, places[..., :1] + torch.arange(width)) or bool((places[..., 0] % width).any()):
            raise self.refuse(f"{path} takes columns in another order")
        per_head = None if width == value.shape[-1] else width
        if per_head is not None and value.shape[-1] % width:
            raise self.refuse(f"{path} takes some columns of a value")
        options: dict[str, Any] = {"eps": float(eps), "offset": float(offset) or None, "dim": per_head}
        (result,) = self.node(op, [value], [value.shape], [Place(path)], **options)
        self.values.hold(out, Arranged(places + result.first))

    def pointwise(self, op: str, x: Tensor, out: Tensor, **options: Any) -> None:
        """Record an elementwise operator."""
        value, places = self.rows_of(x, op)
        (result,) = self.node(op, [value], [value.shape], **options)
        self.values.hold(out, Arranged(places + result.first))

    def routed(self, step: Step, x: Tensor, experts: int, weights: Tensor, index: Tensor) -> None:
        """Record a router, which gives the weights and numbers of some of the experts for each row of x."""
        value = self.in_order(x, str(step.places[0]))
        shape = (*value.shape[:-1], experts)
        (result,) = self.node("route", [value], [shape], list(step.places), **dict(step.options))
        self.values.hold(weights, self.values.new(weights.shape, "routed", about=result))
        self.values.hold(index, self.values.new(index.shape, "chosen", about=result))

    def mixed(self, step: Step, x: Tensor, index: Tensor, weights: Tensor, out: Tensor) -> None:
        """Record experts that are given a router's choice."""
        value = self.in_order(x, str(step.places[0]))
        kinds = ((weights, "routed"), (index, "chosen"))
        routed, chosen = [self._whole(t, kind, "its experts' choice", "a router's") for t, kind in kinds]
        if routed.about is not chosen.about:
            raise self.refuse("its experts are given weights of one router and numbers of another")
        operands = [value, routed.about]
        (result,) = self.node("experts", operands, [value.shape], list(step.places), **dict(step.options))
        self.values.hold(out, result)

    def heads_of(self, tensor: Tensor, what: str) -> tuple[Value, int, float]:
        """Return the value whose heads are [B, heads, tokens, D], the number of heads, and the factor it is multiplied
        by.
        """
        arranged = self.values.held(tensor)
        if arranged is None:
            raise self.refuse(f"{what} are made of nothing")
        if tensor.dtype != self.dtype:
            raise self.refuse("between its parts its forward computes _to_copy")
        return self.heads_held(arranged, what)

    def heads_held(self, arranged: Arranged, what: str) -> tuple[Value, int, float]:
        try:
            return heads(self, arranged, what)
        except Refused as error:
            raise self.refuse(str(error)) from None

    def append(self, op: str, k: Tensor, v: Tensor, all_k: Tensor, all_v: Tensor) -> None:
        """Record that a cache (op "append") or a cache of an encoder's tokens ("keep") was given keys and values."""
        given = [self.heads_of(k, "keys"), self.heads_of(v, "values")]
        times = {x.shape[1] // count for x, (_, count, _) in zip((k, v), given, strict=True)}
        if len(times) > 1 or (op != "append" and times != {1}):
            raise self.refuse("its cache holds some heads of keys and values several times")
        repeat = None if times == {1} else times.pop()
        values = []
        for value, _, factor in given:
            values.append(value if factor == 1 else self.node("scale", [value], [value.shape], by=factor)[0])
        results = self.node(op, values, [_row_shape(all_k), _row_shape(all_v)], repeat=repeat)
        for tensor, result in zip((all_k, all_v), results, strict=True):
            self.values.hold(tensor, in_heads(result, tensor.shape))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, **options: Any) -> Value:
        """Record attention over [B, heads, tokens, D]; options are those of the program, except that sinks and bias are
        tensors.
        """
        queries, keys, values = self.heads_of(q, "queries"), self.heads_of(k, "keys"), self.heads_of(v, "values")
        scale = options.pop("scale") * queries[2] * keys[2]
        operands = [queries[0], keys[0], self.scaled(values)]
        if mask is not None:
            operands.append(self._whole(mask, "mask", "its attention's mask"))
        sinks, bias = options.pop("sinks", None), options.pop("bias", None)
        if sinks is not None:
            options["sinks"] = Place(self._whole(sinks, "parameter", "its attention's sinks").name, tensor=True)
        if bias is not None:
            options["bias"] = self._whole(bias, "bias", "its attention's bias")
        (result,) = self.node("attention", operands, [_row_shape(out)], dim=q.shape[-1], scale=float(scale), **options)
        self.values.hold(out, in_heads(result, out.shape))
        return result

    def moved(self, tensor: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the tensor with its elements rearranged by a part."""
        out, held = move(tensor), self.values.held(tensor)
        if held is not None:
            factor = move(held.factor) if isinstance(held.factor, Tensor) else held.factor
            self.values.hold(out, Arranged(move(held.identities), factor))
        return out

    def scaled(self, found: tuple[Value, int, float]) -> Value:
        value, _, factor = found
        return value if factor == 1 else self.node("scale", [value], [value.shape], by=factor)[0]

    def _whole(self, tensor: Tensor, kind: str, what: str, expected: str = "the one that the layer is given") -> Value:
        arranged = self.values.held(tensor)
        value = None if arranged is None else self.values.whole(arranged, kind)
        if value is None:
            raise self.refuse(f"{what} is not {expected}")
        return value

    # What the forward does between them.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        with _disable_current_modes():
            if name == "lift_fresh":  # a number or a list in the source
                out = func(*args, **kwargs)
                if out.dim():
                    self.values.hold(out, self.values.new(out.shape, "literal"))
                return out
            held = [x for x in tensors_in(args, kwargs) if self.values.held(x) is not None]
            if not held or name in FACTORIES:
                out = func(*args, **kwargs)
                if name in ZEROS:
                    self.values.hold(out, self.values.new(out.shape, "zeros"))
                return out
            in_place = name.endswith("_") and not name.startswith("_")
            handler = HANDLERS.get(name.removesuffix("_") if in_place else name)
            if handler is None or (in_place and self.values.shares_given(args[0])):
                raise self.refuse(f"between its parts its forward computes {name}")
            before = tree_map(self._frozen, args) if in_place else args
            out = func(*args, **kwargs)
            try:
                if in_place:
                    found = handler(self, func, out, *before, **kwargs)
                    self.values.let_go_of(out)
                    self.values.hold(out, found)
                else:
                    self._hold(out, handler(self, func, out, *args, **kwargs))
            except Refused as error:
                raise self.refuse(str(error)) from None
            return out

    def _frozen(self, x: Any) -> Any:
        """Return a tensor object that keeps these contents when the original is written."""
        held = self.values.held(x) if isinstance(x, Tensor) else None
        if held is None:
            return x
        copy = x.detach()
        self.values.hold(copy, held)
        return copy

    def _hold(self, out: Any, found: Any) -> None:
        if isinstance(out, Tensor):
            self.values.hold(out, found)
        else:
            for tensor, arranged in zip(out, found, strict=True):
                self.values.hold(tensor, arranged)

    def is_zero(self, x: Tensor) -> bool:
        """Return True if the forward made it as zeros, whatever its size."""
        return self.kind(x) == "zeros"

    def arranged(self, x: Any, like: Tensor) -> Arranged:
        """Return a tensor's contents broadcast to another's shape."""
        held = self.values.held(x)
        if held is None:
            raise Refused(self._between("arithmetic with a tensor of its own making"))
        factor = held.factor.expand(like.shape) if isinstance(held.factor, Tensor) else held.factor
        return Arranged(held.identities.expand(like.shape), factor)

    def kind(self, x: Any) -> str:
        """Return the kind of value whose elements a tensor holds; "number" for numbers and constants without
        dimensions.
        """
        if not isinstance(x, Tensor):
            return "number"
        held = self.values.held(x)
        if held is None:
            return "number" if x.dim() == 0 else "constant"
        value = self.values.within(held)
        return "rows" if value is None else value.kind

    def _between(self, what: str) -> str:
        return f"between its parts its forward computes {what}"

    def program(self, out: Tensor) -> Program:
        """Return the program whose result is the tensor; keeps only the steps that lead there and the inputs they
        read.
        """
        result = self.in_order(out, "the result")
        return _written(self, result)


class Functions(TorchFunctionMode):
    """Treat scaled_dot_product_attention as one operator, whatever it decomposes into."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p:
            raise self.recorder.refuse("its attention drops out in evaluation")
        scale = q.shape[-1] ** -0.5 if scale is None else scale

        def asked() -> Tensor:
            out = attend(q, k, v, attn_mask, scale=scale, causal=is_causal)
            self.recorder.attention(q, k, v, attn_mask, out, scale=scale, causal=is_causal)
            return out

        return aside(asked)()


def _row_shape(heads_: Tensor) -> tuple[int, int, int]:
    return heads_.shape[0], heads_.shape[2], heads_.shape[1] * heads_.shape[3]


def _written(recorder: Recorder, result: Value) -> Program:
    """Return the steps that lead to the result, in the order in which they ran."""
    needed: set[int] = set()
    waiting = [result]
    while waiting:
        node = waiting.pop().node
        if node is not None and id(node) not in needed:
            needed.add(id(node))
            waiting += node.values
            waiting += [option for option in node.options.values() if isinstance(option, Value)]
    nodes: dict[int, Node] = {}

    def visit(node: Node | None) -> None:  # what a step reads comes before it
        if node is not None and id(node) in needed and id(node) not in nodes:
            for value in (*node.values, *node.options.values()):
                if isinstance(value, Value):
                    visit(value.node)
            nodes[id(node)] = node

    for node in (*recorder.nodes, result.node):
        visit(node)
    read = {v.first for node in nodes.values() for v in (*node.values, *node.options.values()) if isinstance(v, Value)}
    read.add(result.first)
    names: dict[int, str] = {}
    inputs: list[str] = []
    for value in recorder.values.all:
        if value.name and value.kind != "parameter":
            names[value.first] = value.name
            if value.first in read or not inputs:
                inputs.append(value.name)
    steps = []
    for node in nodes.values():
        results = node.results
        places = tuple(node.places)
        if node.op == "linear":
            whole, *parts = results
            if parts and whole.first in read:
                raise recorder.refuse(f"it takes some columns of {places[0]}, and all of them")
            if parts:
                results = sorted(parts, key=lambda part: part.rows or (0, 0, 0))
                places = tuple([places[0]._replace(rows=part.rows) for part in results])
        for value in results:
            names[value.first] = f"v{len(names)}"
        options: list[tuple[str, Option]] = [
            (name, names[option.first] if isinstance(option, Value) else option)
            for name, option in node.options.items()
        ]
        step = Step(tuple([names[v.first] for v in results]), node.op, tuple([names[v.first] for v in node.values]))
        steps.append(Step(step.results, step.op, step.values, places).with_options(**dict(options)))
    return Program(tuple(inputs), tuple(steps), names[result.first]).check()
