"""What the forwards of whole layers share: the parts as the layer holds them at the call, and what speaks against
computing them all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmkern import dispatch
from llmkern.checks import PLAIN_TENSORS
from llmkern.integrations.transformers.attention import WEIGHTS, registered_places
from llmkern.nn.int8_linear import Int8Linear
from llmkern.ops.int8_linear import resolve_scheme
from llmkern.swap.guard import Part, guarded, why_hooks
from llmkern.swap.surroundings import classes_within, why_hooks_for_all, why_untouched

__all__ = [
    "LinearPart",
    "NormPart",
    "NotServed",
    "at",
    "check_arguments",
    "check_guard",
    "computed",
    "eps_of",
    "layer_mask",
    "linear_arguments",
    "norm_parameter",
    "why_not_fused",
    "scheme_argument",
    "whole_class",
    "run_parts",
]


class LinearPart(NamedTuple):
    """Where a linear layer is: by names from the layer down, and which rows of it are meant (None for all): from
    which to which, of how many."""

    path: tuple[str, ...]
    rows: tuple[int, int, int] | None = None


class NormPart(NamedTuple):
    """Where a norm is, the names of its parameters, and its eps: an attribute's name, or the number."""

    path: tuple[str, ...]
    weight: str
    bias: str | None
    eps: str | float


class NotServed(Exception):
    """The call is left to the layer's parts; the message is the reason."""


def why_not_fused(module: nn.Module, hidden: Tensor) -> str | None:
    """Why this call cannot use the fused layer op, or None; independent of the layer's parts."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return "the model is being compiled, exported or traced"
    if torch.is_grad_enabled():
        return "gradients are enabled, and the op for a whole layer has none: use torch.no_grad()"
    if module.training:
        return "the layer is in training mode"
    if type(hidden) not in PLAIN_TENSORS or hidden.device.type != "cpu":
        return f"the hidden states are a {type(hidden).__name__} on {hidden.device.type}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the dtypes"
    return why_hooks_for_all() or why_untouched()


def run_parts(module: Any, op: str, reason: str, hidden: Tensor, args: Any, kwargs: Any) -> Any:
    """The call by the layer's own forward, whose parts are dispatched one by one, on record with the reason."""
    dispatch.record_parts(op, "its parts", reason, {"hidden": hidden})
    return module._llmkern_original.forward(module, hidden, *args, **kwargs)


def computed(op: Callable[..., Tensor], operator: Any, arguments: Sequence[Any]) -> Tensor:
    """The op of a whole layer; `NotServed` where a backend is forced that has none: it may have those of the parts.

    `operator` is the op as PyTorch knows it.  Without the dispatcher's look at some 40 arguments it is called where
    that could only choose it and nobody wants to hear of it.
    """
    if dispatch.unwatched():
        with torch._C._AutoDispatchBelowAutograd():
            out: Tensor = operator(*arguments)
            return out
    name, forced = op.__name__, dispatch.forced_backend()
    if forced is not None and all(impl.backend.name != forced for impl in dispatch.implementations(name)):
        raise NotServed(f"the forced backend {forced!r} does not implement {name}")
    return op(**dict(zip([a.name for a in operator._schema.arguments], arguments, strict=True)))


def check_arguments(args: Sequence[Any], kwargs: dict[str, Any], known: frozenset[str]) -> None:
    """Raises `NotServed` where the call says more than the op can be told."""
    if args:
        raise NotServed("the layer is called with more than the hidden states by position")
    for name, argument in kwargs.items():
        if name == "output_attentions" and argument:
            raise NotServed(WEIGHTS)
        # Absent is not False: is_causal=False means something.
        if argument is not None and name not in known and name != "output_attentions":
            raise NotServed(f"the model passes {name}, which llmkern does not know")


def check_guard(module: Any) -> None:
    """Raises `NotServed` where something is no longer what it was, or calling a part would do more than compute."""
    reason = module._llmkern_guard.broken(module)
    if reason is not None:
        raise NotServed(reason)


def whole_class(
    module: nn.Module,
    attention: nn.Module,
    forward: Callable[..., Any],
    layer: Any,
    parts: tuple[Part, ...],
    *attributes: tuple[str, Any],
) -> type[nn.Module]:
    """The class for a layer that `forward` computes as one.  layer: what the forward is to know of it.  parts: what it
    takes for granted of the modules in it.  attributes: other members of the class."""
    return guarded(
        type(module),
        forward,
        ("_llmkern_layer", layer),
        *attributes,
        parts=parts,
        within=classes_within(module),
        places=registered_places(attention),
    )


def at(module: Any, path: tuple[str, ...]) -> Any:
    """The child at the path."""
    for name in path:
        module = module._modules[name]
    return module


def norm_parameter(module: nn.Module, norm: NormPart, name: str | None, like: Tensor) -> Tensor | None:
    """A parameter of a norm, which has like's dtype; None where it has none of that name."""
    try:
        parameter: Tensor | None = None if name is None else at(module, norm.path)._parameters[name]
    except KeyError:
        raise NotServed(f"the {name} of {norm.path[-1]} is no parameter") from None
    if parameter is not None:
        if parameter.dtype is not like.dtype or type(parameter) not in PLAIN_TENSORS:
            raise NotServed(f"the {name} of {norm.path[-1]} has another type than the hidden states")
        if not _is_row(parameter):
            raise NotServed(f"the {name} of {norm.path[-1]} is not one contiguous row")
    return parameter


def eps_of(module: nn.Module, norms: Sequence[NormPart | None]) -> float:
    """The eps that all the norms have."""
    found = [
        getattr(at(module, norm.path), norm.eps) if isinstance(norm.eps, str) else norm.eps
        for norm in norms
        if norm is not None
    ]
    if found.count(found[0]) != len(found) or type(found[0]) is not float:
        raise NotServed("its norms have different eps")
    return found[0]


def linear_arguments(
    module: nn.Module, linears: tuple[LinearPart, ...], like: Tensor
) -> tuple[list[Tensor | None], tuple[str | None, ...]]:
    """(weight, scale, bias) of each linear layer, one after the other, and their schemes, None for floating point."""
    found: list[Tensor | None] = []
    dtype = like.dtype
    schemes: list[str | None] = []
    for path, rows in linears:
        layer = at(module, path)
        cls, state = type(layer), layer.__dict__
        if cls is not nn.Linear and cls is not Int8Linear:
            raise NotServed(f"{path[-1]} is a {cls.__name__}, not a plain linear layer")
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
            reason = why_hooks(".".join(path), state)
            if reason is not None:
                raise NotServed(reason)
        parameters = state["_parameters"]
        scale = scheme = None
        try:
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:
            raise NotServed(f"the weight or bias of {path[-1]} is no parameter") from None
        if cls is Int8Linear:
            scale, scheme = layer._buffers["weight_scale"], layer._scheme
        elif weight.dtype is not dtype:
            raise NotServed(f"the weight of {path[-1]} is {weight.dtype}, the hidden states are {dtype}")
        if type(weight) not in PLAIN_TENSORS or (bias is not None and bias.dtype is not dtype):
            raise NotServed(f"the weight or bias of {path[-1]} has another type than the hidden states")
        if weight.stride(1) != 1 and weight.shape[1] > 1:
            raise NotServed(f"the rows of {path[-1]}'s weight are not contiguous")
        if not (bias is None or _is_row(bias)) or not (scale is None or scale.is_contiguous()):
            raise NotServed(f"the bias or scale of {path[-1]} is not contiguous")
        if rows is not None:
            begin, end, count = rows
            if weight.shape[0] != count:
                raise NotServed(f"{path[-1]} has {weight.shape[0]} rows, and had {count} when it was swapped")
            part = slice(begin, end)
            weight, scale, bias = (None if t is None else t[part] for t in (weight, scale, bias))
        found += (weight, scale, bias)
        schemes.append(scheme)
    return found, tuple(schemes)


def _is_row(parameter: Tensor) -> bool:
    return parameter.dim() == 1 and parameter.is_contiguous()


def scheme_argument(schemes: tuple[str | None, ...], like: Tensor) -> str:
    """The schemes of a layer's linear layers as the op takes them, for an input like this."""
    resolved = {scheme: "w8a8" if scheme is None else resolve_scheme(scheme, like) for scheme in set(schemes)}
    each = [resolved[scheme] for scheme in schemes]
    return each[0] if each.count(each[0]) == len(each) else ",".join(each)


def layer_mask(mask: Any, hidden: Tensor, keys: int) -> Tensor:
    """The model's mask as the op takes it."""
    plain = type(mask) in PLAIN_TENSORS and mask.dim() == 4
    if not plain or mask.dtype not in (torch.bool, hidden.dtype, torch.float32) or mask.shape[-1] < keys:
        raise NotServed("the attention mask is no 4-dimensional tensor of bools or of numbers for every key")
    return mask[..., :keys] if mask.shape[-1] > keys else mask  # transformers 4 prepares one for a longer cache
