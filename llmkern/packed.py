"""Packed weights: codes of 4 to 8 bits with scales in blocks, stored in one layout that every kernel reads.

    weight[n, k] = scale · (level(code) − zero) + offset

scale, zero and offset are per row and group of k (16, 32, 64, 128 … columns).  Scales and offsets of few bits are
multiplied by those of a larger group, as GGUF's K-quants have them: `super_scale`, `super_offset`.

Layout: panels of 16 rows and blocks of 32 columns, rows padded with zeros to whole panels.  Of a block, a line of 64
bytes holds four neighbouring codes of each row, so that a register of any width multiplies whole rows by the same four
numbers of x.  Codes of four bits: lines 0–3 in the lower halves of four lines of bytes, lines 4–7 in the upper ones.
Codes of five and six bits: the same of their lowest four, then the fifth bits of all eight lines in one line of bytes
(bit i is line i's), or the upper two bits of four lines each in two.  Scales, zeros and offsets: [panels, groups, 16].
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["BLOCK", "CODES", "PANEL", "Code", "PackedWeight", "from_panels", "to_panels"]

PANEL = 16
BLOCK = 32
_LINES = 8  # of a block: 4 columns each


@dataclass(frozen=True)
class Code:
    """A kind of codes: the number of bits, and the levels that they represent.

    level: code − shift, or table[code].
    smallest_group: of columns that share a scale.
    """

    bits: int
    shift: int = 0
    table: tuple[int, ...] | None = None
    smallest_group: int = BLOCK

    @property
    def block_bytes(self) -> int:
        """Bytes in a block of 16 rows × 32 columns."""
        return PANEL * BLOCK * self.bits // 8

    def levels(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the levels that unsigned codes represent."""
        if self.table is not None:
            return torch.tensor(self.table, dtype=dtype, device=codes.device)[codes.long()]
        if self.bits == 8:
            return codes.view(torch.int8).to(dtype)
        return codes.to(dtype) - self.shift


CODES: dict[str, Code] = {
    "s8": Code(8),
    "s4": Code(4, shift=8),
    "u4": Code(4),
    # llama.cpp's levels for normally distributed weights (kvalues_iq4nl).
    "nl4": Code(4, table=(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)),
    "s5": Code(5, shift=16),
    "u5": Code(5),
    "s6": Code(6, shift=32, smallest_group=16),
}
"""Codes by name.  s8 is two's complement; the others are unsigned codes less the shift, u4 and u5 without one."""


def to_panels(codes: Tensor, code: str) -> Tensor:
    """Arrange unsigned codes [N, K] in the layout above: uint8 [panels, K / 32, bytes].  K is a multiple of 32."""
    n, k = codes.shape
    panels = -(-n // PANEL)
    padded = codes.new_zeros(panels * PANEL, k)
    padded[:n] = codes
    lines = padded.view(panels, PANEL, k // BLOCK, _LINES, 4).permute(0, 2, 3, 1, 4)
    lines = lines.reshape(panels, k // BLOCK, _LINES, PANEL * 4)
    bits = CODES[code].bits
    if bits == 8:
        return lines.flatten(2)
    low = lines & 15
    parts = [low[:, :, :4] | low[:, :, 4:] << 4]
    high = lines >> 4
    if bits == 5:
        parts.append(_together(high, 1))
    if bits == 6:
        parts += [_together(high[:, :, :4], 2), _together(high[:, :, 4:], 2)]
    return torch.cat(parts, 2).flatten(2)


def from_panels(panels: Tensor, code: str, n: int, height: int = PANEL) -> Tensor:
    """Return the unsigned codes [n, K] that `to_panels` was given.  height: rows of a panel."""
    bits = CODES[code].bits
    lines = panels.unflatten(2, (bits, height * 4))
    if bits < 8:
        low, high = lines[:, :, :4], lines[:, :, 4:]
        lines = torch.cat([low & 15, low >> 4], 2)
        if bits == 5:
            lines = lines | _apart(high, 1, _LINES) << 4
        if bits == 6:
            lines = lines | torch.cat([_apart(high[:, :, :1], 2, 4), _apart(high[:, :, 1:], 2, 4)], 2) << 4
    count, blocks = panels.shape[:2]
    rows = lines.unflatten(3, (height, 4)).permute(0, 3, 1, 2, 4)
    return rows.reshape(count * height, blocks * BLOCK)[:n]


def _together(values: Tensor, bits: int) -> Tensor:
    """Combine lines: line i of values [panels, blocks, lines, bytes] goes to bits [i · bits, (i + 1) · bits) of one
    line.
    """
    out = torch.zeros_like(values[:, :, 0])
    for i in range(values.shape[2]):
        out |= values[:, :, i] << i * bits
    return out.unsqueeze(2)


def _apart(line: Tensor, bits: int, lines: int) -> Tensor:
    return torch.cat([line >> i * bits & (1 << bits) - 1 for i in range(lines)], 2)


def _groups_to_panels(values: Tensor) -> Tensor:
    n, groups = values.shape
    padded = values.new_zeros(-(-n // PANEL) * PANEL, groups)
    padded[:n] = values
    return padded.view(-(-n // PANEL), PANEL, groups).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class PackedWeight:
    """A weight [n, k] in the layout of this module.

    code: a name in `CODES`.
    codes: uint8 [panels, k / 32, bytes of a block].
    scale: [panels, groups, 16], floating, or int8 or uint8 with a super_scale.
    zero: [panels, groups, 16] uint8, the code that stands for 0; of codes without a shift.
    offset: as scale.
    super_scale, super_offset: [panels, supers, 16], floating; what scale and offset are multiples of.
    """

    code: str
    n: int
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    offset: Tensor | None = None
    super_scale: Tensor | None = None
    super_offset: Tensor | None = None

    @classmethod
    def from_rows(cls, code: str, codes: Tensor, scale: Tensor, **others: Tensor | None) -> PackedWeight:
        """Pack unsigned codes [n, k], uint8 or for "s8" int8, and scales [n, groups] and so on, as a file has them."""
        tensors = {name: None if value is None else _groups_to_panels(value) for name, value in others.items()}
        return cls(code, codes.shape[0], to_panels(codes.view(torch.uint8), code), _groups_to_panels(scale), **tensors)

    def rows(self, name: str) -> Tensor | None:
        """Return the tensor of this name in the form that `from_rows` takes."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            return None
        if name == "codes":
            codes = from_panels(value, self.code, self.n, self.scale.shape[2])
            return codes.contiguous().view(torch.int8) if CODES[self.code].bits == 8 else codes
        panels, groups, height = value.shape
        return value.transpose(1, 2).reshape(panels * height, groups)[: self.n].contiguous()

    @property
    def k(self) -> int:
        """Number of columns."""
        return self.codes.shape[1] * BLOCK

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors that are present, by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        """Total bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def panels(self, first: int, last: int) -> PackedWeight:
        """Return the rows of panels [first, last)."""
        n = min(self.n, last * PANEL) - first * PANEL
        part: dict[str, Any] = {name: tensor[first:last] for name, tensor in self.tensors.items()}
        return replace(self, n=n, **part)

    def take(self, rows: Tensor) -> Tensor:
        """Gather rows by index, from 0 to n − 1: [*rows.shape, k], with the values of `dequantized`."""
        which = rows.flatten().long()
        panel, row = which // PANEL, which % PANEL
        lines = self.codes.unflatten(2, (CODES[self.code].bits, PANEL, 4))
        # Panels of one row each, in the same order.
        part: dict[str, Any] = {
            name: lines[panel, :, :, row].flatten(2) if name == "codes" else tensor[panel, :, row].unsqueeze(2)
            for name, tensor in self.tensors.items()
        }
        return replace(self, n=which.numel(), **part).dequantized().view(*rows.shape, self.k)

    def dequantized(self) -> Tensor:
        """Return the weight, [n, k], in fp32, or in fp64 if the scales are."""
        wide = any(tensor.dtype == torch.float64 for tensor in self.tensors.values())
        dtype = torch.float64 if wide else torch.float32
        level = CODES[self.code].levels(from_panels(self.codes, self.code, self.n, self.scale.shape[2]), dtype)
        spread = {
            name: self.rows(name).to(dtype).repeat_interleave(self.k // max(1, tensor.shape[1]), 1)  # type: ignore[union-attr]
            for name, tensor in self.tensors.items()
            if name != "codes"
        }
        scale = spread["scale"] * spread["super_scale"] if "super_scale" in spread else spread["scale"]
        weight = scale * (level - spread["zero"] if "zero" in spread else level)
        if "offset" not in spread:
            return weight
        return weight + (spread["offset"] * spread["super_offset"] if "super_offset" in spread else spread["offset"])
