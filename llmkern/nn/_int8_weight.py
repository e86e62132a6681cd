"""Shared base of the int8 modules: one code per element, one scale per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmkern import ops
from llmkern.nn._quantized_weight import HOOKS, QuantizedWeight, check_to_quantize, wrong_scale

__all__ = ["HOOKS", "Int8Weight", "quantized"]


class Int8Weight(QuantizedWeight):
    """Mixin: int8 codes [rows, columns] and fp32 scales [rows, 1]; weight = codes · weight_scale."""

    def _hold_zeros(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        codes = torch.zeros(rows, columns, dtype=torch.int8, device=device)
        scale = torch.zeros(rows, 1, dtype=torch.float32, device=device)
        self._hold(nn.Parameter(codes, requires_grad=False), dtype, weight_scale=scale)

    def hold(self, codes: Tensor, scale: Tensor) -> None:
        """Store these codes, a Parameter [rows, columns] int8, and scales, [rows, 1] fp32, without copying them."""
        self._hold(codes, self.dtype, weight_scale=scale)  # type: ignore[arg-type]

    @property
    def weight_size(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def format_name(self) -> str:
        return "int8"

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return (self.codes.detach() * self.weight_scale).to(self.dtype if dtype is None else dtype)

    def _wrong_tensors(self, prefix: str, state_dict: dict[str, Any]) -> list[str]:
        key, scale_key = f"{prefix}weight", f"{prefix}weight_scale"
        wrong = []
        codes = state_dict.get(key)
        if codes is not None and codes.dtype != torch.int8:
            wrong = [f"{key} is {codes.dtype}, expected torch.int8 (quantize the floating-point model with quantize_)"]
        elif codes is not None and scale_key not in state_dict:
            wrong = [f"{scale_key} is missing, without which the codes in {key} have no meaning"]
        return [*wrong, *wrong_scale(scale_key, state_dict)]

    def _adapted(self, prefix: str, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Convert scales that other programs store in the model's dtype; here they stay fp32, also when tensors are
        assigned.
        """
        key = f"{prefix}weight_scale"
        if key not in state_dict or state_dict[key].dtype == torch.float32:
            return state_dict
        return {**state_dict, key: state_dict[key].float()}


def quantized(what: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a floating-point weight row by row; return its codes and scales.

    Raises TypeError for other dtypes, ValueError for meta tensors and values that are not finite.
    """
    check_to_quantize(what, weight)
    codes, scale = ops.quantize_int8(weight)
    if not bool(scale.isfinite().all()):
        raise ValueError(f"{what}: weight has NaN or infinite values, expected finite ones")
    return codes, scale
