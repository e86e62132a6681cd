"""Weights packed into int32 words by compressed-tensors (`pack-quantized`), GPTQ and AWQ.

Each function that reads takes a layer's tensors under the names that checkpoints have, and returns the packed weight
and, where activations were ordered (`g_idx`), the permutation of the columns of x that it is to be multiplied with.
All raise ValueError, with the name of the tensor, for what does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmkern.packed import BLOCK, CODES, PackedWeight
from llmkern.quantization.formats._bits import fields_of, words_of

__all__ = ["read_awq", "read_gptq", "read_pack_quantized", "why_not_pack_quantized", "write_pack_quantized"]

Tensors = Mapping[str, Tensor]

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place in an int32 word at which AWQ keeps each of eight neighbouring rows."""


def read_pack_quantized(tensors: Tensors, bits: int) -> tuple[PackedWeight, Tensor | None]:
    """compressed-tensors: `weight_packed` [N, K·bits/32], `weight_scale` [N, groups], `weight_shape` [2].

    weight_zero_point: int32, packed along the rows; there where the scheme is asymmetric.  weight_g_idx: [K].
    Codes are offset by half their range.
    """
    n, k = (int(size) for size in _tensor(tensors, "weight_shape", 1))
    packed, scale = _tensor(tensors, "weight_packed", 2), _tensor(tensors, "weight_scale", 2)
    _check_bits(bits, (4, 5, 6, 8))
    _check(packed.shape == (n, k * bits // 32) and k * bits % 32 == 0, "weight_packed", packed, (n, k * bits // 32))
    _check(scale.shape[0] == n, "weight_scale", scale, (n, "groups"))
    codes = fields_of(packed, bits)
    zeros = None
    if (zero := tensors.get("weight_zero_point")) is not None:
        if 32 % bits:
            raise ValueError(f"weight_zero_point of codes of {bits} bits, expected none")
        expected = (-(-n // (32 // bits)), scale.shape[1])
        _check(zero.shape == expected, "weight_zero_point", zero, expected)
        zeros = fields_of(zero.T, bits).T[:n]
    return _packed(codes, scale, zeros, bits, tensors.get("weight_g_idx"), "weight_g_idx")


def why_not_pack_quantized(packed: PackedWeight) -> str | None:
    """Return why `write_pack_quantized` does not take a weight, or None."""
    if packed.code not in ("s4", "s5", "s6", "s8", "u4"):
        return f"codes {packed.code!r} have no place in compressed-tensors' format"
    if packed.offset is not None or packed.super_scale is not None:
        return "its blocks have offsets or scales of scales, for which compressed-tensors' format has no place"
    if packed.zero is not None and int(packed.zero.max()) > 15:
        return "it has a zero point of 16, and compressed-tensors' have four bits"
    return None


def write_pack_quantized(packed: PackedWeight) -> dict[str, Tensor]:
    """The tensors that `read_pack_quantized` reads.  Raises ValueError with the reason where there are none."""
    if reason := why_not_pack_quantized(packed):
        raise ValueError(reason)
    bits = CODES[packed.code].bits
    codes, scale, zero = (packed.rows(name) for name in ("codes", "scale", "zero"))
    assert codes is not None
    assert scale is not None
    codes = codes.view(torch.uint8) ^ 128 if bits == 8 else codes
    groups = scale.shape[1]
    tensors = {"weight_scale": scale, "weight_shape": torch.tensor([packed.n, packed.k])}
    if zero is not None:
        rows = zero.new_zeros(-(-packed.n // 8) * 8, groups)
        rows[: packed.n] = zero
        tensors["weight_zero_point"] = words_of(rows.T.contiguous(), 4).T.contiguous()
    return {"weight_packed": words_of(codes, bits), **tensors}


def read_gptq(tensors: Tensors, bits: int, *, version: int) -> tuple[PackedWeight, Tensor | None]:
    """GPTQ: `qweight` [K·bits/32, N], `qzeros` [groups, N·bits/32], `scales` [groups, N], `g_idx` [K] or none.

    version: 1 where the zero points are stored less 1 (`checkpoint_format` "gptq"), 2 where as they are ("gptq_v2").
    """
    if version not in (1, 2):
        raise ValueError(f"GPTQ: version of the zero points is {version!r}, expected 1 or 2")
    _check_bits(bits)
    qweight, scales = _tensor(tensors, "qweight", 2), _tensor(tensors, "scales", 2)
    qzeros = _tensor(tensors, "qzeros", 2)
    n = qweight.shape[1]
    _check(scales.shape[1] == n, "scales", scales, ("groups", n))
    expected = (scales.shape[0], n * bits // 32)
    _check(qzeros.shape == expected, "qzeros", qzeros, expected)
    codes = fields_of(qweight.T, bits)
    # The sum is stored in as many bits as a code: version 1's 15 stands for 16.
    zeros = fields_of(qzeros, bits).T + (1 if version == 1 else 0)
    return _packed(codes, scales.T, zeros, bits, tensors.get("g_idx"), "g_idx")


def read_awq(tensors: Tensors, bits: int = 4) -> tuple[PackedWeight, Tensor | None]:
    """AWQ: `qweight` [K, N/8], `qzeros` [groups, N/8], `scales` [groups, N]; rows of a word are in AWQ's order."""
    if bits != 4:
        raise ValueError(f"AWQ: bits is {bits}, expected 4")
    qweight, scales = _tensor(tensors, "qweight", 2), _tensor(tensors, "scales", 2)
    qzeros = _tensor(tensors, "qzeros", 2)
    n = qweight.shape[1] * 8
    _check(scales.shape[1] == n, "scales", scales, ("groups", n))
    _check(qzeros.shape == (scales.shape[0], n // 8), "qzeros", qzeros, (scales.shape[0], n // 8))
    codes, zeros = (
        fields_of(words, 4).unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1).T for words in (qweight, qzeros)
    )
    return _packed(codes, scales.T, zeros, bits, None, "")


def _packed(
    codes: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, g_idx: Tensor | None, name: str
) -> tuple[PackedWeight, Tensor | None]:
    k, groups = codes.shape[1], scale.shape[1]
    if groups == 0 or k % groups or (k // groups) % BLOCK:
        raise ValueError(
            f"{groups} groups of K = {k} columns; groups that are multiples of {BLOCK} columns are accepted"
        )
    if not bool(scale.isfinite().all()):
        raise ValueError("scales have NaN or infinite values, expected finite ones")
    permutation = None if g_idx is None else _permutation(g_idx, k, groups, name)
    if permutation is not None:
        codes = codes[:, permutation]
    half = 1 << bits - 1
    if zeros is None or bool((zeros == half).all()):  # symmetric
        codes = (codes ^ 128).view(torch.int8) if bits == 8 else codes
        return PackedWeight.from_rows(f"s{bits}", codes.contiguous(), scale.contiguous()), permutation
    if bits != 4:
        raise ValueError(f"zero points of {bits}-bit codes are not all {half}; symmetric ones are accepted")
    return PackedWeight.from_rows("u4", codes.contiguous(), scale.contiguous(), zero=zeros.contiguous()), permutation


def _permutation(g_idx: Tensor, k: int, groups: int, name: str) -> Tensor | None:
    """Return the columns in the order of their groups, or None if they are in order."""
    _check(g_idx.shape == (k,), name, g_idx, (k,))
    order = torch.argsort(g_idx.long(), stable=True)
    expected = torch.arange(k, device=g_idx.device) // (k // groups)
    if not torch.equal(g_idx.long()[order], expected):
        raise ValueError(f"{name} does not have {k // groups} columns for each of {groups} groups")
    return None if torch.equal(g_idx.long(), expected) else order


def _tensor(tensors: Tensors, name: str, dims: int) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{name} is missing, expected {', '.join(sorted(tensors))} and it")
    if tensors[name].dim() != dims:
        raise ValueError(f"{name} has {tensors[name].dim()} dimensions, expected {dims}")
    return tensors[name]


def _check_bits(bits: int, accepted: tuple[int, ...] = (4, 8)) -> None:
    if bits not in accepted:
        raise ValueError(f"codes have {bits} bits, expected {', '.join(map(str, accepted[:-1]))} or {accepted[-1]}")


def _check(right: bool, name: str, tensor: Tensor, expected: tuple[object, ...]) -> None:
    if not right:
        wanted = ", ".join(map(str, expected))
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{wanted}]")
