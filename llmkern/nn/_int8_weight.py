"""What the int8 modules share: codes, scales, and how they are loaded and converted."""

from __future__ import annotations

import copy
import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llmkern import ops
from llmkern.checks import FLOATING, PLAIN_TENSORS
from llmkern.nn._weight_view import WeightView, settle_views

__all__ = ["Int8Weight", "quantized", "with_hooks"]

Module = TypeVar("Module", bound=nn.Module)
Self = TypeVar("Self", bound="Int8Weight")

_alive: weakref.WeakSet[Int8Weight] = weakref.WeakSet()
"""Every int8 module: a write to one reaches those that share its codes."""
_views: weakref.WeakValueDictionary[int, WeightView] = weakref.WeakValueDictionary()
"""The view of each weight that somebody holds, by the id of its codes: tied weights are the same object to them."""


class Int8Weight(nn.Module):
    """Mixin: holds int8 codes [rows, columns] and fp32 scales [rows, 1], and shows a floating-point weight.

    `_parameters["weight"]`, as `codes`: a frozen int8 Parameter, which state dicts, FSDP and tensor parallelism see.
    weight_scale: a buffer, fp32.
    weight: their product in the module's dtype, computed when its values are read (`WeightView`).  Writing to it, or
        training it, turns the module into the floating-point layer.
    """

    weight_scale: Tensor
    from_conv1d: bool = False
    _floating: Tensor
    # Values come from a floating-point layer or a checkpoint: transformers has nothing to initialise.
    _is_hf_initialized = True

    def _hold_codes(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        # The first parameter, so that whoever asks `next(module.parameters())` for dtype and device gets the right
        # ones.  Without elements, and converted by .to(dtype) with everything else.
        self.register_parameter("_floating", _remembering(torch.empty(0, dtype=dtype, device=device)))
        codes = torch.zeros(rows, columns, dtype=torch.int8, device=device)
        self._parameters["weight"] = nn.Parameter(codes, requires_grad=False)  # register_parameter would read weight
        self.register_buffer("weight_scale", torch.zeros(rows, 1, dtype=torch.float32, device=device))
        _alive.add(self)

    def hold(self, codes: Tensor, scale: Tensor) -> None:
        """Take these codes, a Parameter [rows, columns] int8, and scales, [rows, 1] fp32, as they are."""
        self._parameters["weight"] = codes  # type: ignore[assignment]
        self.weight_scale = scale
        self._parameters["_floating"] = _remembering(torch.empty(0, dtype=self.dtype, device=codes.device))

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype in which the module computes, and of its weight as others read it."""
        return self._floating.dtype

    @property
    def codes(self) -> Tensor:
        """The int8 codes themselves, [rows, columns]."""
        codes = self._parameters.get("weight")
        if codes is None:
            raise RuntimeError(f"the codes of the {type(self).__name__} were taken away: dequantize_ it before that")
        if isinstance(codes, WeightView):  # put there by a library that has moved what it read
            codes = self._parameters["weight"] = codes.module.codes
        return codes

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
            like = torch.empty(codes.shape, dtype=self.dtype, device="meta")
            view = _views[id(codes)] = WeightView(self, like, codes.device)
        return view

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight" or not isinstance(value, Tensor):
            super().__setattr__(name, value)
        elif isinstance(value, WeightView) and isinstance(value.module, Int8Weight):  # tied: codes with their scales
            self._parameters["weight"] = value.module.codes  # type: ignore[assignment]
            self.weight_scale = value.module.weight_scale.clone()
        elif value.is_floating_point():
            self.make_floating(value.module.weight if isinstance(value, WeightView) else value)
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

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """codes * weight_scale, [rows, columns], computed in fp32 and rounded to `dtype` (default: this layer's)."""
        return (self.codes.detach() * self.weight_scale).to(self.dtype if dtype is None else dtype)

    def moved(self: Self, device: torch.device) -> Self:
        """A module with copies of the codes and scales on another device, to stand behind a view."""
        out = type(self).__new__(type(self))
        out.__dict__.update(self.__dict__)
        parameters = {name: value for name, value in self._parameters.items() if value is not None}
        out._parameters = {name: nn.Parameter(value.detach().to(device), False) for name, value in parameters.items()}
        out._buffers = {"weight_scale": self.weight_scale.to(device)}
        return out

    def make_floating(self, weight: Tensor | None = None) -> None:
        """Turn this module into the floating-point layer that its codes stand for, or that has `weight`, in place.

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
            "llmkern: the weight of an int8 layer is written or trained, and the layer is floating point from now on; "
            "llmkern.quantize_ makes it int8 again",
            UserWarning,
            stacklevel=4,
        )
        for module in holders:
            module._forget_codes(shared)
        settle_views(holders)

    def _forget_codes(self, weight: nn.Parameter) -> None:
        del self._parameters["_floating"], self._buffers["weight_scale"]
        self._parameters["weight"] = weight
        self.__class__ = self._floating_class()  # type: ignore[assignment]

    def _floating_class(self) -> type[nn.Module]:
        """What `make_floating` makes of the module."""
        raise NotImplementedError

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """As nn.Module's; a layer whose weight is to be trained becomes floating point, which codes cannot be."""
        if requires_grad:
            self.make_floating()
        nn.Module.requires_grad_(self, requires_grad)
        return self

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def wrong_values(self, prefix: str) -> list[str]:
        """What is wrong with what the module holds, a sentence each that names a tensor by `prefix` and its name."""
        held = {f"{prefix}weight": self.codes, f"{prefix}weight_scale": self.weight_scale}
        return Int8Weight._wrong_state(self, prefix, held)

    def _wrong_state(self, prefix: str, state_dict: dict[str, Any]) -> list[str]:
        """What speaks against loading this state, a sentence each."""
        return [
            *_wrong_shapes(prefix, state_dict, self),
            *_wrong_codes(f"{prefix}weight", f"{prefix}weight_scale", state_dict),
            *_wrong_scale(f"{prefix}weight_scale", state_dict),
        ]

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
        if weight is not None and scale is None and weight.is_floating_point() and weight.shape == self.codes.shape:
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
            _with_fp32(f"{prefix}weight_scale", state_dict),
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
    """Whether peft's `modules_to_save` is making the copy: it trains all of it, and saves and loads a plain layer's
    tensors, but has no place where a layer could say how."""
    frame = inspect.currentframe()
    while frame is not None:  # the layer may be within what is copied
        if frame.f_code.co_name == "update" and type(frame.f_locals.get("self")).__name__ == "ModulesToSaveWrapper":
            return True
        frame = frame.f_back
    return False


def _remembering(empty: Tensor) -> nn.Parameter:
    return nn.Parameter(empty, requires_grad=False)


def quantized(what: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a floating-point weight, row by row.

    Raises TypeError for other dtypes, ValueError for meta tensors and values that are not finite.
    """
    if weight.dtype not in FLOATING:
        raise TypeError(
            f"{what}: weight is {weight.dtype}, expected float32, bfloat16, float16 or float64"
            + (" (the layer is quantized already)" if weight.dtype == torch.int8 else "")
        )
    if weight.device.type == "meta":
        raise ValueError(f"{what}: weight is on the meta device, which has no values to quantize")
    codes, scale = ops.quantize_int8(weight)
    if not bool(scale.isfinite().all()):
        raise ValueError(f"{what}: weight has NaN or infinite values, expected finite ones")
    return codes, scale


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""What register_forward_hook and its like write to."""


def with_hooks(module: Module, like: nn.Module) -> Module:
    """`module` with the hooks and the training flag of `like`."""
    for name in HOOKS:
        setattr(module, name, getattr(like, name).copy())
    module.train(like.training)
    return module


def _wrong_shapes(prefix: str, state_dict: dict[str, Any], module: Int8Weight) -> list[str]:
    own = {"weight": module.codes, "weight_scale": module.weight_scale, "bias": module._parameters.get("bias")}
    return [
        f"{prefix}{name} has shape {list(state_dict[prefix + name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in own.items()
        if tensor is not None and prefix + name in state_dict and state_dict[prefix + name].shape != tensor.shape
    ]


def _wrong_codes(key: str, scale_key: str, state_dict: dict[str, Any]) -> list[str]:
    codes = state_dict.get(key)
    if codes is None:
        return []
    if codes.dtype != torch.int8:
        return [f"{key} is {codes.dtype}, expected torch.int8 (quantize the floating-point model with quantize_)"]
    if scale_key not in state_dict:
        return [f"{scale_key} is missing, without which the codes in {key} have no meaning"]
    return []


def _wrong_scale(key: str, state_dict: dict[str, Any]) -> list[str]:
    scale = state_dict.get(key)
    if scale is None:
        return []
    if not scale.is_floating_point():
        return [f"{key} is {scale.dtype}, expected a floating-point dtype"]
    if scale.device.type != "meta" and not bool(((scale >= 0) & scale.isfinite()).all()):
        return [f"{key} has NaN, infinite or negative values, expected finite ones that are not negative"]
    return []


def _with_fp32(key: str, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Other programs store scales in the model's dtype; here they stay fp32, also when tensors are assigned."""
    if key not in state_dict or state_dict[key].dtype == torch.float32:
        return state_dict
    return {**state_dict, key: state_dict[key].float()}
