"""Shared base of modules over a `PackedWeight`: its tensors as parameters and buffers, and how they are loaded."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmkern.nn._quantized_weight import QuantizedWeight
from llmkern.packed import BLOCK, CODES, PackedWeight

__all__ = ["PackedModule"]

_GROUPS = ("scale", "zero", "offset", "super_scale", "super_offset")


class PackedModule(QuantizedWeight):
    """Mixin: a `PackedWeight` [rows, columns], in any of its codes.

    codes: frozen uint8 Parameter, as `PackedWeight.codes`; state dicts call it `weight`.
    weight_scale, weight_zero, weight_offset, weight_super_scale, weight_super_offset: buffers, as in `PackedWeight`;
        None for formats without one.
    permutation: int32 [columns], the column of the input that each column of the packed weight is multiplied with;
        None for columns in order.
    code: a name in `llmkern.packed.CODES`.  kind: what the format is called in reports.
    """

    HELD: ClassVar[tuple[str, ...]] = (*(f"weight_{name}" for name in _GROUPS), "permutation")

    code: str
    kind: str
    permutation: Tensor | None
    _rows: int

    def _hold_packed(
        self, packed: PackedWeight, dtype: torch.dtype, permutation: Tensor | None, kind: str | None
    ) -> None:
        self.code, self._rows = packed.code, packed.n
        self.kind = kind or _kind_of(packed)
        held = {f"weight_{name}": getattr(packed, name) for name in _GROUPS}
        codes = packed.codes if isinstance(packed.codes, nn.Parameter) else nn.Parameter(packed.codes, False)
        self._hold(codes, dtype, **held, permutation=None if permutation is None else permutation.to(torch.int32))

    @property
    def packed(self) -> PackedWeight:
        """Return the weight as it is stored, with its columns in their own order."""
        groups = {name: self._buffers[f"weight_{name}"] for name in _GROUPS}
        return PackedWeight(self.code, self._rows, self.codes.detach(), **groups)  # type: ignore[arg-type]

    @property
    def weight_size(self) -> tuple[int, int]:
        return self._rows, self.codes.shape[1] * BLOCK

    @property
    def format_name(self) -> str:
        return self.kind

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        weight = self.packed.dequantized()
        if self.permutation is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.permutation.long(), weight)
        return weight.to(self.dtype if dtype is None else dtype)

    def _tie_to(self, other: QuantizedWeight) -> bool:
        if not isinstance(other, PackedModule):
            return False
        self.code, self.kind, self._rows = other.code, other.kind, other._rows
        return super()._tie_to(other)

    def get_extra_state(self) -> Tensor:
        # A tensor, because safetensors stores nothing else.
        return torch.tensor(list(CODES).index(self.code), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: loading has already compared the code, which decided the shapes and buffers."""

    def _wrong_state(self, prefix: str, state_dict: dict[str, Any]) -> list[str]:
        state = state_dict.get(f"{prefix}_extra_state")
        own = list(CODES).index(self.code)
        if isinstance(state, Tensor) and state.numel() == 1 and int(state) == own or state is None:
            return super()._wrong_state(prefix, state_dict)
        return [f"{prefix}_extra_state is {state!r}, expected tensor({own}), of weights in code {self.code!r}"]

    def _wrong_tensors(self, prefix: str, state_dict: dict[str, Any]) -> list[str]:
        own = {"weight": self.codes, **self.held()}
        given = {name: state_dict.get(f"{prefix}{name}") for name in own}
        if given["weight"] is None:
            return []
        wrong = []
        for name, tensor in own.items():
            key, value = f"{prefix}{name}", given[name]
            if tensor is None:
                continue
            if value is None:
                wrong.append(f"{key} is missing, without which the codes in {prefix}weight have no meaning")
            elif value.dtype != tensor.dtype:
                hint = " (quantize the floating-point model with quantize_)" if name == "weight" else ""
                wrong.append(f"{key} is {value.dtype}, expected {tensor.dtype}{hint}")
            elif value.is_floating_point() and value.device.type != "meta" and not bool(value.isfinite().all()):
                wrong.append(f"{key} has NaN or infinite values, expected finite ones")
        return wrong


def _kind_of(packed: PackedWeight) -> str:
    bits = CODES[packed.code].bits
    group = packed.k // max(packed.scale.shape[1], 1)
    if packed.code == "s8":
        return "int8-block" if group == BLOCK else f"int8 g{group}"
    return f"int{bits} g{group}"
