"""Fields of bits in tensors of integers, as files pack them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["fields_of", "nibbles", "words_of"]


def nibbles(packed: Tensor, width: int) -> Tensor:
    """[..., m] bytes as [..., 2m] codes: of each `width` bytes first the lower halves, then the upper ones."""
    parts = packed.unflatten(-1, (-1, width))
    return torch.stack([parts & 15, parts >> 4], -2).flatten(-3)


def words_of(fields: Tensor, bits: int) -> Tensor:
    """Invert `fields_of`: pack [rows, m] uint8 into [rows, m · bits / 32] int32; m fills whole words."""
    per_part = 32 // math.gcd(bits, 32)
    parts = fields.unflatten(1, (-1, per_part)).to(torch.int32)
    words = torch.zeros(*parts.shape[:2], per_part * bits // 32, dtype=torch.int32, device=fields.device)
    for i, part in enumerate(parts.unbind(-1)):
        word, at = divmod(i * bits, 32)
        words[..., word] |= part << at
        if at + bits > 32:
            words[..., word + 1] |= part >> 32 - at
    return words.flatten(1)


def fields_of(words: Tensor, bits: int) -> Tensor:
    """[rows, m] int32 as [rows, m · 32 / bits] uint8, the lowest bits first; a field may begin in one word and end in
    the next.
    """
    per_part = 32 // math.gcd(bits, 32)
    parts = words.unflatten(-1, (-1, per_part * bits // 32))
    fields = torch.empty(*parts.shape[:-1], per_part, dtype=torch.uint8, device=words.device)
    for i in range(per_part):
        word, at = divmod(i * bits, 32)
        field = parts[..., word] >> at & (1 << min(bits, 32 - at)) - 1
        if at + bits > 32:
            field = field | parts[..., word + 1] << 32 - at & (1 << bits) - 1
        fields[..., i] = field
    return fields.flatten(-2)
