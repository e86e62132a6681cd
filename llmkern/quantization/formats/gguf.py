"""GGUF's block types, as ggml lays them out (ggml/src/ggml-common.h); each is read into a `PackedWeight` as it is.

`unpack(blocks, type)` of the gguf package is what they are tested against, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkern.packed import PackedWeight
from llmkern.quantization.formats._bits import nibbles

__all__ = ["GGUF_TYPES", "GgufType"]


@dataclass(frozen=True)
class GgufType:
    """name, number: as in GGUF files.  columns, nbytes: of a block.

    read: blocks [rows, k / columns, nbytes] uint8 to the packed weight.
    """

    name: str
    number: int
    columns: int
    nbytes: int
    read: Callable[[Tensor], PackedWeight]


def _half(raw: Tensor) -> Tensor:
    """Pairs of bytes as fp16: [..., 2m] to [..., m]."""
    return raw.contiguous().view(torch.float16)


def _q8_0(blocks: Tensor) -> PackedWeight:
    codes = blocks[..., 2:].contiguous().view(torch.int8).flatten(1)
    return PackedWeight.from_rows("s8", codes, _half(blocks[..., :2]).flatten(1))


def _of_32(code: str, *, offset: bool, high: bool) -> Callable[[Tensor], PackedWeight]:
    """Blocks of 32 codes of four bits: scale, offset, fifth bits and the codes, those of them that there are."""

    def read(blocks: Tensor) -> PackedWeight:
        after = 4 if offset else 2
        scales = _half(blocks[..., :after])
        codes = nibbles(blocks[..., after + (4 if high else 0) :], 16)
        if high:
            bits = torch.arange(8, dtype=torch.uint8, device=blocks.device)
            fifth = blocks[..., after : after + 4].unsqueeze(-1) >> bits & 1
            codes = codes | fifth.flatten(-2) << 4
        others = {"offset": scales[..., 1]} if offset else {}
        return PackedWeight.from_rows(code, codes.flatten(1), scales[..., 0], **others)

    return read


def _six_bit_pairs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight scales and eight offsets, of six bits, in 12 bytes of a K-quant."""
    low, middle, high = packed.unflatten(-1, (3, 4)).unbind(-2)
    scale = torch.cat([low & 63, high & 15 | low >> 2 & 48], -1)
    offset = torch.cat([middle & 63, high >> 4 | middle >> 2 & 48], -1)
    return scale, offset


def _k_quant(code: str) -> Callable[[Tensor], PackedWeight]:
    """Q4_K and Q5_K: 256 codes, scale and offset of each 32 in six bits, and what they are multiples of."""

    def read(blocks: Tensor) -> PackedWeight:
        supers = _half(blocks[..., :4])
        scale, offset = _six_bit_pairs(blocks[..., 4:16])
        codes = nibbles(blocks[..., -128:], 32)
        if code == "u5":  # bit i of byte j is that of code 32 i + j
            bits = torch.arange(8, dtype=torch.uint8, device=blocks.device)
            fifth = blocks[..., 16:48].unsqueeze(-2) >> bits.unsqueeze(-1) & 1
            codes = codes | fifth.flatten(-2) << 4
        return PackedWeight.from_rows(
            code,
            codes.flatten(1),
            scale.flatten(1),
            offset=offset.flatten(1),
            super_scale=supers[..., 0],
            super_offset=-supers[..., 1],
        )

    return read


def _q6_k(blocks: Tensor) -> PackedWeight:
    low = nibbles(blocks[..., :128], 64)
    pairs = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> pairs.view(4, 1) & 3
    scale = blocks[..., 192:208].contiguous().view(torch.int8)
    codes = low | high.flatten(-3) << 4
    return PackedWeight.from_rows(
        "s6", codes.flatten(1), scale.flatten(1), super_scale=_half(blocks[..., 208:])[..., 0]
    )


def _iq4_xs(blocks: Tensor) -> PackedWeight:
    pairs = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    high = (blocks[..., 2:4].unsqueeze(-1) >> pairs & 3).flatten(-2)  # two bytes, little-endian
    low = torch.stack([blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4], -1).flatten(-2)
    scale = (low | high << 4).view(torch.int8) - 32
    codes = nibbles(blocks[..., 8:], 16)
    return PackedWeight.from_rows("nl4", codes.flatten(1), scale.flatten(1), super_scale=_half(blocks[..., :2])[..., 0])


GGUF_TYPES: dict[str, GgufType] = {
    each.name: each
    for each in (
        GgufType("Q4_0", 2, 32, 18, _of_32("s4", offset=False, high=False)),
        GgufType("Q4_1", 3, 32, 20, _of_32("u4", offset=True, high=False)),
        GgufType("Q5_0", 6, 32, 22, _of_32("s5", offset=False, high=True)),
        GgufType("Q5_1", 7, 32, 24, _of_32("u5", offset=True, high=True)),
        GgufType("Q8_0", 8, 32, 34, _q8_0),
        GgufType("Q4_K", 12, 256, 144, _k_quant("u4")),
        GgufType("Q5_K", 13, 256, 176, _k_quant("u5")),
        GgufType("Q6_K", 14, 256, 210, _q6_k),
        GgufType("IQ4_NL", 20, 32, 18, _of_32("nl4", offset=False, high=False)),
        GgufType("IQ4_XS", 23, 256, 136, _iq4_xs),
    )
}
"""Block types by name.  Q5_0 and Q5_1 replace K-quants in llama.cpp where rows are no multiple of 256."""
