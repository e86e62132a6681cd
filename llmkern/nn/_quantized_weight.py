"""Shared base of modules with a quantized weight: codes and scales, and how they are loaded and converted."""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from llmkern.checks import FLOATING, PLAIN_TENSORS
from llmkern.nn._weight_view import WeightView, settle_views

__all__ = ["HOOKS", "QuantizedWeight", "check_to_quantize", "with_hooks", "wrong_scale"]

Module = TypeVar("Module", bound=nn.Module)
Self = TypeVar("Self", bound="QuantizedWeight")

_alive: weakref.WeakSet[QuantizedWeight] = weakref.WeakSet()
"""Every quantized module: a write to one reaches those that share its codes."""
_views: weakref.WeakValueDictionary[int, WeightView] = weakref.WeakValueDictionary()
"""The view of each weight that somebody holds, by the id of its codes: tied weights are the same object to them."""


class QuantizedWeight(nn.Module):
    """Mixin: stores integer codes and their scales, and shows a floating-point weight [rows, columns].

    `_parameters["weight"]`, as `codes`: a frozen Parameter of integers, which state dicts, FSDP and tensor parallelism
        see.
    HELD: the names of the buffers that give codes their meaning; one that is not needed is None.  `.to(dtype)` and its
        like leave their dtypes alone.
    weight: the floating-point weight in the module's dtype, computed when its values are read (`WeightView`).  Writing
        to it, or training it, turns the module into the floating-point layer.
    """

    HELD: ClassVar[tuple[str, ...]] = ("weight_scale",)

    weight_scale: Tensor
    from_conv1d: bool = False
    _floating: Tensor
    # Values come from a floating-point layer or a checkpoint: transformers has nothing to initialise.
    _is_hf_initialized = True

    def _hold(self, codes: nn.Parameter, dtype: torch.dtype, **held: Tensor | None) -> None:
        """Register the codes, the buffers by their names in HELD, and the dtype of the weight they represent."""
        # The first parameter, so that whoever asks `next(module.parameters())` for dtype and device gets the right
        # ones.  Without elements, and converted by .to(dtype) with everything else.
        self.register_parameter("_floating", _remembering(torch.empty(0, dtype=dtype, device=codes.device)))
        self._parameters["weight"] = codes  # register_parameter would read weight
        for name in self.HELD:
            self.register_buffer(name, held[name])
        _alive.add(self)

    @property
    @abstractmethod
    def weight_size(self) -> tuple[int, int]:
        """Return the rows and columns of the weight that the codes represent."""

    @property
    @abstractmethod
    def format_name(self) -> str:
        """Return the weight's format for reports: "int8", "int4 g64", …"""

    @abstractmethod
    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Compute the weight, [rows, columns], in fp32 and round it to `dtype` (default: this layer's)."""

    def held(self) -> dict[str, Tensor | None]:
        """Return the buffers by their names in HELD."""
        return {name: self._buffers[name] for name in self.HELD}

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point dtype in which the module computes and in which other code sees its weight."""
        return self._floating.dtype

    @property
    def codes(self) -> Tensor:
        """Integer codes as they are stored."""
        codes = self._parameters.get("weight")
        if codes is None:
            raise RuntimeError(f"the codes of the {type(self).__name__} were taken away: dequantize_ it before that")
        if isinstance(codes, WeightView):  # put there by a library that has moved what it read
            codes = self._parameters["weight"] = codes.module.codes
        return codes

    @property
    def shares_codes(self) -> bool:
        """Return True if another module holds the same codes, as an embedding does that is tied to an output head."""
        return any(other is not self and other._parameters.get("weight") is self.codes for other in _alive)

    @property
    def weight(self) -> Tensor:
        codes = self.codes
        is_plain = type(codes) in PLAIN_TENSORS
        # Nothing to compute: a loader is about to fill it, or FSDP keeps a shard of it here until the forward.
        if codes.is_meta or (not is_plain and type(self.weight_scale) in PLAIN_TENSORS):
            return codes
        if not is_plain or torch.compiler.is_compiling():
            return self.dequantized_weight()
        view = _views.get(id(codes))
        form = (self.dtype, codes.device)
        if view is None or view.module._parameters["weight"] is not codes or (view.dtype, view.device) != form:
            like = torch.empty(self.weight_size, dtype=self.dtype, device="meta")
            view = _views[id(codes)] = WeightView(self, like, codes.device)
        return view

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight" or not isinstance(value, Tensor):
            super().__setattr__(name, value)
        elif isinstance(value, WeightView) and value.is_packed and self._tie_to(value.module):
            pass
        elif value.is_floating_point():
            self.make_floating(value.values() if isinstance(value, WeightView) and value.is_packed else _plain(value))
        else:
            super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if (floating := self._buffers.pop("_floating", None)) is not None:  # pickled when it was a buffer
            self._non_persistent_buffers_set.discard("_floating")
            self._parameters = {"_floating": _remembering(floating), **self._parameters}
        _alive.add(self)

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        if _copied_to_be_trained():
            copied.make_floating()
        return copied

    def moved(self: Self, device: torch.device) -> Self:
        """Return a module with copies of the codes and scales on another device, to serve as the source of a view."""
        out = type(self).__new__(type(self))
        out.__dict__.update(self.__dict__)
        parameters = {name: value for name, value in self._parameters.items() if value is not None}
        out._parameters = {name: nn.Parameter(value.detach().to(device), False) for name, value in parameters.items()}
        out._buffers = {name: None if tensor is None else tensor.to(device) for name, tensor in self.held().items()}
        return out

    def make_floating(self, weight: Tensor | None = None) -> None:
        """Turn this module, in place, into the floating-point layer with the dequantized weight, or with `weight`.

        Modules with the same codes share its weight afterwards.  It warns, since the layer is larger and slower from
        then on; `llmkern.quantize_` makes it int8 again.  Raises RuntimeError for subclasses, which would be lost.
        """
        codes = self.codes
        holders = {self, *(module for module in _alive if module._parameters.get("weight") is codes)}
        for module in holders:
            if "_floating_class" not in vars(type(module)):  # the class of somebody else would be lost
                raise RuntimeError(
                    f"the weight of a {type(module).__name__} cannot be written: dequantize_ the model first"
                )
        with torch.inference_mode(False):  # else it could never be trained
            value = self.dequantized_weight() if weight is None else weight.detach()
            shared = weight if isinstance(weight, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        warnings.warn(
            f"llmkern: the weight of an {self.format_name} layer is written or trained, and the layer is floating "
            f"point from now on; llmkern.quantize_ makes it {self.format_name.split()[0]} again",
            UserWarning,
            stacklevel=4,
        )
        for module in holders:
            module._forget_codes(shared)
        settle_views(holders)

    def _forget_codes(self, weight: nn.Parameter) -> None:
        del self._parameters["_floating"]
        for name in self.HELD:
            del self._buffers[name]
        self._parameters["weight"] = weight
        self.__class__ = self._floating_class()  # type: ignore[assignment]

    @abstractmethod
    def _floating_class(self) -> type[nn.Module]:
        """Class that `make_floating` turns the module into."""

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """Set requires_grad as nn.Module does; a layer whose weight is to be trained becomes floating point, since
        codes cannot be trained.
        """
        if requires_grad:
            self.make_floating()
        nn.Module.requires_grad_(self, requires_grad)
        return self

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.held()
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = self._buffers[name]
            if tensor is not None and now is not None and now.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(now.device)
        return self

    def _tie_to(self, other: QuantizedWeight) -> bool:
        """Share the codes of `other` and copy its scales; return False if they would represent something else here."""
        if other.HELD != self.HELD:
            return False
        self._parameters["weight"] = other.codes  # type: ignore[assignment]
        for name, tensor in other.held().items():
            self._buffers[name] = None if tensor is None else tensor.clone()
        return True

    def wrong_values(self, prefix: str) -> list[str]:
        """Return what is wrong with the module's tensors: one sentence each, naming the tensor by `prefix` and its
        name.
        """
        held = {"weight": self.codes, **self.held()}
        return self._wrong_tensors(prefix, {f"{prefix}{name}": t for name, t in held.items() if t is not None})

    def _wrong_state(self, prefix: str, state_dict: dict[str, Any]) -> list[str]:
        """Return the reasons against loading this state, one sentence each."""
        return [*_wrong_shapes(prefix, state_dict, self), *self._wrong_tensors(prefix, state_dict)]

    @abstractmethod
    def _wrong_tensors(self, prefix: str, state_dict: dict[str, Any]) -> list[str]:
        """Return what is wrong with the codes and scales of a state, one sentence each."""

    def _adapted(self, prefix: str, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Convert a state saved by another program to this module's form."""
        return state_dict

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight, scale = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}weight_scale")
        if weight is not None and scale is None and weight.is_floating_point() and weight.shape == self.weight_size:
            # A floating-point layer's state, as adapters save it of the layers they train.
            self.make_floating(nn.Parameter(weight.detach().to(self.codes.device, self.dtype, copy=True), False))
            self._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        # All of it before anything is copied: new codes with old scales would be garbage.
        wrong = self._wrong_state(prefix, state_dict)
        if wrong:
            error_msgs.extend(wrong)
            return
        super()._load_from_state_dict(
            self._adapted(prefix, state_dict),
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        for extra in (f"{prefix}_extra_state", f"{prefix}_floating"):
            if extra in missing_keys:  # a checkpoint of another program
                missing_keys.remove(extra)


def _copied_to_be_trained() -> bool:
    """Return True if peft's `modules_to_save` is making the copy: it trains all of it, and saves and loads a plain
    layer's tensors, but gives a layer no way to say how.
    """
    frame = inspect.currentframe()
    while frame is not None:  # the layer may be within what is copied
        if frame.f_code.co_name == "update" and type(frame.f_locals.get("self")).__name__ == "ModulesToSaveWrapper":
            return True
        frame = frame.f_back
    return False


def _remembering(empty: Tensor) -> nn.Parameter:
    return nn.Parameter(empty, requires_grad=False)


def check_to_quantize(what: str, weight: Tensor) -> None:
    """Raise TypeError for a weight that is not floating point, ValueError for one on the meta device."""
    if weight.dtype not in FLOATING:
        raise TypeError(
            f"{what}: weight is {weight.dtype}, expected float32, bfloat16, float16 or float64"
            + (" (the layer is quantized already)" if weight.dtype in (torch.int8, torch.uint8) else "")
        )
    if weight.device.type == "meta":
        raise ValueError(f"{what}: weight is on the meta device, which has no values to quantize")


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Attributes that register_forward_hook and similar methods write to."""


def with_hooks(module: Module, like: nn.Module) -> Module:
    """Give `module` the hooks and the training flag of `like`, and return it."""
    for name in HOOKS:
        setattr(module, name, getattr(like, name).copy())
    module.train(like.training)
    return module


def _wrong_shapes(prefix: str, state_dict: dict[str, Any], module: QuantizedWeight) -> list[str]:
    own = {"weight": module.codes, **module.held(), "bias": module._parameters.get("bias")}
    return [
        f"{prefix}{name} has shape {list(state_dict[prefix + name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in own.items()
        if tensor is not None and prefix + name in state_dict and state_dict[prefix + name].shape != tensor.shape
    ]


def wrong_scale(key: str, state_dict: dict[str, Any], *, signed: bool = False) -> list[str]:
    """Return what is wrong with the scales that a state has under this key, one sentence each."""
    scale = state_dict.get(key)
    if scale is None:
        return []
    if not scale.is_floating_point():
        return [f"{key} is {scale.dtype}, expected a floating-point dtype"]
    right = scale.isfinite() if signed else (scale >= 0) & scale.isfinite()
    if scale.device.type != "meta" and not bool(right.all()):
        what = (
            ("NaN or infinite", "finite ones")
            if signed
            else (
                "NaN, infinite or negative",
                "finite ones that are not negative",
            )
        )
        return [f"{key} has {what[0]} values, expected {what[1]}"]
    return []


def _plain(value: Tensor) -> Tensor:
    """Return a view's weight once its module is floating point; otherwise the tensor itself."""
    weight: Tensor = value.module.weight if isinstance(value, WeightView) else value
    return weight
