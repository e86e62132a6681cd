"""What the int8 modules share: codes, scales, and how they are loaded and converted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llmkern import ops
from llmkern.checks import FLOATING

__all__ = ["Int8Weight", "quantized", "with_hooks"]

Module = TypeVar("Module", bound=nn.Module)
Self = TypeVar("Self", bound="Int8Weight")


class Int8Weight(nn.Module):
    """Mixin: `weight`, a frozen Parameter [rows, columns] int8, and `weight_scale`, a buffer [rows, 1] fp32."""

    weight: Tensor
    weight_scale: Tensor
    _floating: Tensor

    def _hold_codes(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        codes = torch.zeros(rows, columns, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("weight_scale", torch.zeros(rows, 1, dtype=torch.float32, device=device))
        # Without elements, and converted by .to(dtype) with everything else: it remembers the floating dtype.
        self.register_buffer("_floating", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of what the module computes and is given back as."""
        return self._floating.dtype

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """weight * weight_scale, [rows, columns], computed in fp32 and rounded to `dtype` (default: this layer's)."""
        return (self.weight.detach() * self.weight_scale).to(self.dtype if dtype is None else dtype)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

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
        extra = f"{prefix}_extra_state"
        if extra in missing_keys:  # a checkpoint of another program
            missing_keys.remove(extra)


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
    own = {"weight": module.weight, "weight_scale": module.weight_scale, "bias": module._parameters.get("bias")}
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
