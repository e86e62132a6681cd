"""Fields of bits in tensors of integers, as files pack them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fields_of", "nibbles", "words_of"]


def nibbles(packed: Tensor, width: int) -> Tensor:
    """[..., m] bytes as [..., 2m] codes: of each `width` bytes first the lower halves, then the upper ones."""
    parts = packed.unflatten(-1, (-1, width))
    return torch.stack([parts & 15, parts >> 4], -2).flatten(-3)


def words_of(fields: Tensor, bits: int) -> Tensor:
    """Invert `fields_of`: pack [rows, m] uint8 into [rows, m · bits / 32] int32; m is a multiple of 32 / bits."""
    words = torch.zeros(fields.shape[0], fields.shape[1] * bits // 32, dtype=torch.int32, device=fields.device)
    for i, part in enumerate(fields.unflatten(1, (-1, 32 // bits)).to(torch.int32).unbind(-1)):
        words |= part << i * bits
    return words


def fields_of(words: Tensor, bits: int) -> Tensor:
    """[rows, m] int32 as [rows, m · 32 / bits] uint8, the lowest bits first; bits divides 32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return (words.unsqueeze(-1) >> shifts & (1 << bits) - 1).to(torch.uint8).flatten(-2)
