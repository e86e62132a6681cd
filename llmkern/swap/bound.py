"""Look up the parameters that a program names in one layer, at each call; used by `layers_` and by `run`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern.checks import PLAIN_TENSORS
from llmkern.nn.int8_linear import Int8Linear
from llmkern.nn.packed_linear import PackedLinear
from llmkern.ops._layer_packed import handle_of, packed_behind
from llmkern.ops.int8_linear import resolve_scheme
from llmkern.programs.passes import quantized
from llmkern.programs.program import Parameter, Place, Program
from llmkern.programs.run import Call
from llmkern.swap.derive import as_before, original_class
from llmkern.swap.guard import Path, why_hooks
from llmkern.swap.match import agrees, probe, why_elsewhere
from llmkern.swap.packed_experts import layout_of
from llmkern.swap.stand_ins import norm_of
from llmkern.swap.whole_layer import NotServed, at

__all__ = ["Bound", "steps_of"]


class Bound:
    """A program's parameters in one layer; implements `Weights` of llmkern/programs/run.py.

    dtype: of the rows.  packed: linear layers that must have this many rows.
    Raises `NotServed` with the reason where a parameter is not what the ops take: another dtype or kind of tensor, a
    linear layer with hooks or of another class.
    """

    def __init__(
        self, program: Program, layer: nn.Module, dtype: torch.dtype, packed: Sequence[tuple[str, int]] = ()
    ) -> None:
        self.program, self.layer, self.dtype = program, layer, dtype
        self.mentioned = _mentioned(program)
        self._routers, self._corrections = _routing(program)
        self._linears: dict[str, tuple[Tensor, Tensor | None, Tensor | None, str | None]] = {}
        self._norms: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self._tensors: dict[str, Tensor] = {}
        for kind, path in self.mentioned:
            {"linear": self._bind_linear, "norm": self._bind_norm, "tensor": self._bind_tensor}[kind](path)
        for path, rows in packed:
            weight = self._linears[path][0]
            held = packed_behind(weight)
            if (now := weight.shape[-2] if held is None else held.n) != rows:
                raise NotServed(f"{path} has {now} rows, and had {rows} when it was swapped")

    @property
    def parameters(self) -> list[Tensor | None]:
        """Return the parameters in the order and form that `layers_` takes: weight, scale and bias of a linear layer,
        weight and bias of a norm, or a single tensor; each once, in the order of first mention.
        """
        found: list[Tensor | None] = []
        for kind, path in self.mentioned:
            if kind == "linear":
                found += self._linears[path][:3]
            elif kind == "norm":
                found += self._norms[path]
            else:
                found.append(self._tensors[path])
        return found

    def schemes(self, like: Tensor) -> str:
        """Return the schemes of the int8 weights: one per linear layer, separated by commas, or a single one if all
        agree.
        """
        named = [path for kind, path in self.mentioned if kind == "linear"]
        each = [self._linears[path][3] for path in named]
        known = {scheme: "w8a8" if scheme is None else resolve_scheme(scheme, like) for scheme in set(each)}
        found = [known[scheme] for scheme in each]
        return found[0] if len(set(found)) == 1 else ",".join(found)

    def text(self, like: Tensor, head: tuple[str, ...]) -> str:
        """Return the program's text with this head, producing int8 codes wherever only int8 weights read the result."""
        coded = [
            path
            for path, (_, scale, _, scheme) in self._linears.items()
            if scale is not None and scheme is not None and resolve_scheme(scheme, like) == "w8a8"
        ]
        return _coded(self.program, frozenset(coded), head)

    def linear(self, path: str, x: Tensor, call: Call) -> Tensor:
        return _product(x, *self._linears[path], call)

    def expert(self, path: str, number: int, x: Tensor, call: Call) -> Tensor:
        *tensors, scheme = self._linears[path]
        weight, scale, bias = [None if tensor is None else tensor[number] for tensor in tensors]
        assert weight is not None
        return _product(x, weight, scale, bias, scheme, call)

    def norm(self, path: str) -> tuple[Tensor | None, Tensor | None]:
        return self._norms[path]

    def tensor(self, path: str) -> Tensor:
        return self._tensors[path]

    def _bind_linear(self, path: str) -> None:
        *above, name = steps_of(path)
        holder = at(self.layer, tuple(above))
        weight: Tensor | None
        bias: Tensor | None
        scale: Tensor | None = None
        scheme: str | None = None
        if name == "in_proj" and isinstance(holder, nn.MultiheadAttention):
            weight, bias = holder.in_proj_weight, holder.in_proj_bias
        elif name not in holder._modules:
            weight, bias = _of_experts(path, holder, name)
        else:
            module: Any = holder._modules[name]
            cls, state = original_class(module), vars(module)
            if cls not in (Int8Linear, PackedLinear) and path not in self._routers and not _is_plain(cls):
                raise NotServed(f"{path} is a {cls.__name__}, not a plain linear layer")
            reason = why_hooks(path, state)
            if reason is not None:
                raise NotServed(reason)
            weight = state["_parameters"].get("weight")
            bias = state["_parameters"].get("bias")
            if bias is None and getattr(module, "bias", None) is not None:
                raise NotServed(f"the bias of {path} is no parameter")
            if cls is Int8Linear:
                scale, scheme = module._buffers["weight_scale"], module._scheme
            elif cls is PackedLinear:
                if module._buffers["permutation"] is not None:
                    raise NotServed(f"{path} reads its input in another order")
                weight = handle_of(module.packed)
            if weight is not None and cls.__name__ == "Conv1D":
                weight = weight.t()
        if type(weight) not in PLAIN_TENSORS or weight is None:
            raise NotServed(f"the weight of {path} is no plain parameter")
        if scale is None and weight.dtype is not self.dtype and packed_behind(weight) is None:
            raise NotServed(f"the weight of {path} is {weight.dtype}, the hidden states are {self.dtype}")
        self._linears[path] = weight, scale, self._checked(f"the bias of {path}", bias), scheme

    def _bind_norm(self, path: str) -> None:
        module = at(self.layer, steps_of(path))
        names = vars(type(module)).get("_llmkern_norm")
        if names is None:
            norm = norm_of(as_before(module))
            if norm is None:
                raise NotServed(f"{path} is no norm any more")
            names = norm.weight, norm.bias
        if missing := [name for name in names[:2] if name is not None and name not in module._parameters]:
            raise NotServed(f"the {missing[0]} of {path} is no parameter")
        held = [None if name is None else module._parameters[name] for name in names[:2]]
        weight, bias = [self._checked(f"a parameter of {path}", parameter) for parameter in held]
        self._norms[path] = weight, bias

    def _bind_tensor(self, path: str) -> None:
        *above, name = steps_of(path)
        tensor = getattr(at(self.layer, tuple(above)), name)
        if path not in self._corrections or type(tensor) not in PLAIN_TENSORS:
            tensor = self._checked(path, tensor)
        if tensor is None:
            raise NotServed(f"{path} is None")
        self._tensors[path] = tensor

    def _checked(self, what: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is not None and (type(tensor) not in PLAIN_TENSORS or tensor.dtype is not self.dtype):
            raise NotServed(f"{what} has another type than the hidden states")
        return tensor


def _product(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, scheme: str | None, call: Call
) -> Tensor:
    if scale is None:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)  # a router's x may be fp32
        y: Tensor = call("linear", x=x, weight=weight, bias=bias, activation="none")
        return y
    form = {"activation": "none", "scheme": resolve_scheme(scheme or "auto", x)}
    y = call("int8_linear", x=x, w_q=weight, w_scale=scale, bias=bias, **form)
    return y


def _of_experts(path: str, holder: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Return weight [experts, rows, columns] and bias of packed experts."""
    layout = layout_of(holder)
    if layout is None or name not in (layout.inner, layout.down):
        raise NotServed(f"{path} is no weight of packed experts any more")
    weight: Any = holder._parameters[name]
    bias = None if layout.bias is None else holder._parameters[name + layout.bias]
    if type(weight) not in PLAIN_TENSORS:
        raise NotServed(f"{path} is no plain parameter")
    return layout.weight(weight), bias


@functools.lru_cache(maxsize=512)
def _routing(program: Program) -> tuple[frozenset[str], frozenset[str]]:
    """Return the paths of a program's routers, and of the tensors that correct their choice."""
    steps = [step for step in program.steps if step.op == "route"]
    corrections = [step.option("correction") for step in steps]
    return (
        frozenset([step.places[0].path for step in steps]),
        frozenset([place.path for place in corrections if isinstance(place, Place)]),
    )


@functools.cache
def steps_of(path: str) -> Path:
    """Split a dotted path into its names; () for ""."""
    return tuple(path.split(".")) if path else ()


@functools.lru_cache(maxsize=512)
def _mentioned(program: Program) -> tuple[Parameter, ...]:
    return program.parameters()


@functools.lru_cache(maxsize=512)
def _coded(program: Program, coded: frozenset[str], head: tuple[str, ...]) -> str:
    if coded:
        program = quantized(program, lambda place: place.path in coded)
    return str(replace(program, inputs=head))


@functools.cache
def _is_plain(cls: Any) -> bool:
    """Check that the class's own forward computes x · weightᵀ + bias (x · weight + bias for transformers' Conv1D)."""
    if cls.forward is nn.Linear.forward:
        return True
    draw = torch.Generator().manual_seed(0)
    weight, bias, x = [torch.randn(shape, generator=draw) for shape in ((5, 4), (5,), (2, 3, 4))]
    conv1d = cls.__name__ == "Conv1D"
    made: Any = object.__new__(cls)
    nn.Module.__init__(made)
    made.weight, made.bias = nn.Parameter(weight.t() if conv1d else weight), nn.Parameter(bias)
    made.in_features, made.out_features, made.nf, made.nx = 4, 5, 5, 4
    return agrees(probe(made, x), F.linear(x, weight, bias)) and not why_elsewhere(made, x)
