"""Find the linear layers of a model that can be replaced, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern.checks import FLOATING
from llmkern.nn._quantized_weight import QuantizedWeight
from llmkern.nn.quantized_linear import LinearOfConv1D, is_conv1d, weight_out_in
from llmkern.ops.int8_matmul import MAX_K
from llmkern.swap.derive import original_class
from llmkern.swap.guard import noted
from llmkern.swap.match import PROBE_SCALE, agrees, probe, stand_in, why_elsewhere

__all__ = [
    "FilterFn",
    "Layer",
    "find_layers",
    "places_of",
    "put",
    "said",
    "stored",
    "why_not_plain_embedding",
    "why_skipped",
]

FilterFn = Callable[[nn.Module, str], bool]
"""Takes a module and its path, as torchao's does."""


@dataclass(frozen=True)
class Layer:
    """A linear layer: its first path, every place that holds it, and why it is to be left alone ("" if it is not)."""

    path: str
    module: nn.Module
    places: tuple[tuple[nn.Module, str], ...]
    reason: str

    @property
    def kind(self) -> str:
        return "Conv1D" if is_conv1d(self.module) else "Linear"

    @property
    def shape(self) -> tuple[int, int]:
        out, k = weight_out_in(self.module).shape
        return out, k


def find_layers(model: nn.Module, skip: Sequence[str], filter_fn: FilterFn | None) -> list[Layer]:
    """Every nn.Linear (subclasses too) and Conv1D that is not quantized yet, once each, in the model's order."""
    names = dict(model.named_modules())
    places = places_of(model)
    owners = _owners(names)
    return [
        Layer(path, module, tuple(places.get(module, ())), _why_leave(path, module, names, owners, skip, filter_fn))
        for path, module in names.items()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and not isinstance(module, QuantizedWeight)
    ]


def places_of(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Return every (parent, attribute) that holds each module; a shared module has several."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, attribute))
    return places


def put(places: Iterable[tuple[nn.Module, str]], module: nn.Module) -> None:
    """Put `module` in all of these places."""
    for parent, attribute in places:
        setattr(parent, attribute, module)


def stored(module: nn.Module) -> Tensor | None:
    """Return the tensor stored as the module's weight: codes if quantized, None if it is computed from another
    tensor.
    """
    return module._parameters.get("weight")


def said(model: Any, getter: str) -> Any:
    """Ask a transformers model; returns None for other models, and if its class has no answer."""
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def _owners(names: dict[str, nn.Module]) -> dict[Tensor, list[str]]:
    """Map each parameter to the modules that hold it."""
    owners: dict[Tensor, list[str]] = {}
    for path, module in names.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, []).append(path)
    return owners


def _why_leave(
    path: str,
    module: nn.Module,
    names: dict[str, nn.Module],
    owners: dict[Tensor, list[str]],
    skip: Sequence[str],
    filter_fn: FilterFn | None,
) -> str:
    reason = why_skipped(path, skip)
    if reason:
        return reason
    reason = _why_not_plain(module) or _why_adapter(path, names) or _why_read_directly(path, names)
    if reason:
        return reason
    for owner in owners[module.weight]:  # type: ignore[index]
        # A plain embedding becomes int8 together with the head that is tied to it.
        if names[owner] is not module and (why := why_skipped(owner, skip) or _why_not_embedding(names[owner])):
            return f"its weight is shared with {owner}: {why}"
    if filter_fn is not None and not filter_fn(module, path):
        return "filter_fn returned False"
    return ""


def _why_not_embedding(module: nn.Module) -> str:
    return why_not_plain_embedding(module) if isinstance(module, nn.Embedding) else f"a {type(module).__name__}"


def why_skipped(path: str, skip: Sequence[str]) -> str:
    """Return the reason if `skip` names the path or consecutive parts of it."""
    named = [name for name in skip if f".{name}." in f".{path}."]
    return f"skip names {named[0]!r}" if named else ""


def why_not_plain_embedding(module: nn.Embedding) -> str:
    """Return why an embedding does more than look up rows, or "" for a plain one."""
    if type(module) is not nn.Embedding:
        return f"a {type(module).__name__} may do more than nn.Embedding does"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, as accelerate's offloading does"
    if module.max_norm is not None:
        return "its max_norm writes to the weight"
    if module.weight.layout is not torch.strided:
        return f"its weight is laid out as {module.weight.layout}"
    if module.weight.dtype not in FLOATING:
        return f"its weight is {module.weight.dtype}"
    return ""


def _why_not_plain(module: nn.Module) -> str:
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, as accelerate's offloading does"
    if original_class(module) not in (nn.Linear, LinearOfConv1D) and not is_conv1d(module) and not _is_same(module):
        return f"a {type(module).__name__} may do more than nn.Linear does"
    weight = module.weight
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if weight.layout is not torch.strided:
        return f"its weight is laid out as {weight.layout}"
    if weight.dtype not in FLOATING:
        return f"its weight is {weight.dtype}"
    out, k = weight_out_in(module).shape
    if not out or not k:
        return "its weight has no elements"
    if k > MAX_K:
        return f"K is {k}, and s32 sums are exact up to {MAX_K}"
    return ""


class _Same(nn.Linear):
    pass


def _is_same(module: nn.Module) -> bool:
    """Probe whether a subclass of nn.Linear computes what that does, from weight and bias alone, and has no other
    methods of its own.  Falcon's linear layers are such.
    """
    cls = original_class(module)
    names = {name for c in cls.__mro__[: cls.__mro__.index(nn.Linear)] for name in vars(c)}
    if names - {"__init__", "__annotations__", "forward", *vars(_Same)}:
        return False
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = [torch.randn(shape, generator=generator) for shape in ((3, 5), (3,), (2, 7, 5))]
    held = None if module.bias is None else bias
    shell = stand_in(module, parameters={"weight": weight, "bias": held})
    if not all(agrees(probe(shell, x * s), F.linear(x * s, weight, held)) for s in (1, PROBE_SCALE)):
        return False
    parts = noted(shell)
    reads = None if parts is None else {read.name for part in parts for read in part.reads}
    return reads is not None and reads <= {"weight", "bias"} and not why_elsewhere(shell, x)


def _ancestors(path: str, names: dict[str, nn.Module]) -> list[tuple[nn.Module, str]]:
    """Yield every module above `path`, with the rest of the path below it."""
    parts = path.split(".") if path else []
    return [(names[".".join(parts[:i])], ".".join(parts[i:])) for i in range(len(parts))]


def _why_adapter(path: str, names: dict[str, nn.Module]) -> str:
    """peft wraps a layer in a module that has it as `base_layer`, with the adapter's own layers beside it."""
    for ancestor, below in _ancestors(path, names):
        if isinstance(getattr(ancestor, "base_layer", None), nn.Module):
            if below.split(".")[0] != "base_layer":
                return "it is part of an adapter, which stays trainable"
            if getattr(ancestor, "merged", False):
                return "an adapter is merged into its weight: unmerge it first"
            if any(getattr(ancestor, "use_dora", {}).values()):
                return "DoRA reads its weight"
    return ""


def _why_read_directly(path: str, names: dict[str, nn.Module]) -> str:
    for ancestor, _ in _ancestors(path, names):
        if isinstance(ancestor, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
            return f"the fused path of {type(ancestor).__name__} reads its weight without calling it"
    return ""
