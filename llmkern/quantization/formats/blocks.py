"""int8 in blocks of 32, and 4 to 6 bits in groups: packed from a floating-point weight by a search for the scales.

The search is what llama.cpp (`make_qx_quants`) and opt-RTN do without calibration: of several ranges, each followed by
the scale of least squares for its codes, the one with the least squared error, group by group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkern.packed import BLOCK, CODES, PackedWeight

__all__ = [
    "Grid",
    "extended",
    "pack_groups",
    "pack_groups_with_feedback",
    "pack_int8_blocks",
    "why_not_extended",
    "why_not_in_blocks",
]

RANGES = tuple(0.70 + 0.05 * i for i in range(8))
"""Ranges to try, as fractions of the largest magnitude in a group; values beyond are clipped."""

AT_ONCE = 1 << 22
"""Numbers of a weight for which scales are searched at a time; what is tried takes several times their memory."""

LEAST_IMPORTANCE = 0.01
"""Added to each column's measured importance, in units of the mean importance."""

SMALLEST, LARGEST = 2.0**-12, 65504.0
"""Scales are kept in fp16 where the weight's largest is between these, so that those of smaller groups lose nothing
that counts beside it; else in fp32."""


def why_not_in_blocks(rows: int, columns: int, group: int) -> str | None:
    """Return why a weight of this size has no such blocks, or None."""
    if columns % group:
        return f"its {columns} columns are no multiple of {group}"
    return None if rows else "its weight has no elements"


def pack_int8_blocks(weight: Tensor) -> PackedWeight:
    """Round each 32 columns of a weight [n, k] to int8, amax / 127 in fp16: llama.cpp's Q8_0.

    Raises ValueError for other k and for values that are not finite.
    """
    groups, kept = _groups("int8-block", weight, BLOCK, 127)
    scale = (groups.abs().amax(-1, keepdim=True) / 127).to(kept)
    codes = _rounded(groups, scale, -127, 127)
    return PackedWeight.from_rows("s8", codes.to(torch.int8).flatten(1), scale.squeeze(-1))


def pack_groups(
    weight: Tensor,
    group: int = 32,
    *,
    bits: int = 4,
    symmetric: bool = True,
    importance: Tensor | None = None,
) -> PackedWeight:
    """Round a weight [n, k] to 2^bits levels with a scale for each `group` columns, and of 4 bits a zero point too.

    group: 32, 64 or 128.  bits: 4, 5 or 6.
    symmetric: levels −8 … 7 (of 5 bits −16 … 15, of 6 −32 … 31) times a scale of either sign, so that the larger end of
        a group has the further level; else scale · (q − zero), q and zero from 0 to 15.
    importance: [k], what an error in each column counts, squared; the mean square of the input that the column is
        multiplied with makes it the error of the product (llama.cpp's importance matrix).
    Raises as `pack_int8_blocks` does.
    """
    grid = Grid(group, symmetric, bits)
    groups, kept = _groups(f"int{bits}", weight, group, -grid.low)
    counts = None if importance is None else importance.unflatten(0, (-1, group))
    codes, scales, zeros = [], [], []
    for part in groups.split(max(1, AT_ONCE // weight.shape[1])):
        scale, zero = grid.fitted(part, counts, kept)
        codes.append(grid.codes(part, scale, zero).flatten(1).to(torch.uint8))
        scales.append(scale)
        zeros += [] if zero is None else [zero]
    return grid.packed(torch.cat(codes), torch.cat(scales), torch.cat(zeros) if zeros else None)


def extended(packed: PackedWeight, weight: Tensor) -> PackedWeight:
    """Return the packed weight with as many rows as `weight` [n, k] has: first its own, then those of `weight`.

    Raises ValueError where `why_not_extended` gives a reason.
    """
    if reason := why_not_extended(packed):
        raise ValueError(f"no rows can be added to a weight with {reason}")
    codes, scale = packed.rows("codes"), packed.rows("scale")
    assert codes is not None
    assert scale is not None
    if len(weight) > packed.n:
        rows, bits = weight[packed.n :].detach(), CODES[packed.code].bits
        more = pack_int8_blocks(rows) if bits == 8 else pack_groups(rows, packed.k // scale.shape[1], bits=bits)
        own_codes, own_scale = more.rows("codes"), more.rows("scale")
        assert own_codes is not None
        assert own_scale is not None
        codes, scale = torch.cat([codes, own_codes]), torch.cat([scale, own_scale.to(scale.dtype)])
    return PackedWeight.from_rows(packed.code, codes[: len(weight)], scale[: len(weight)])


def why_not_extended(packed: PackedWeight) -> str | None:
    """Return what a packed weight has that rows cannot be rounded to here, or None."""
    if packed.code not in ("s4", "s5", "s6", "s8"):
        return f"codes {packed.code!r}"
    if packed.offset is not None or packed.super_scale is not None:
        return "offsets or scales of scales"
    group = packed.k // packed.scale.shape[1]
    return None if group in ((BLOCK,) if packed.code == "s8" else (32, 64, 128)) else f"groups of {group}"


@dataclass(frozen=True)
class Grid:
    """The levels of a weight of few bits; of each group scale and zero point [n, groups, 1], codes from 0.

    group: 32, 64 or 128 columns.  symmetric: whether the middle code stands for 0, as it does beyond 4 bits.
    """

    group: int
    symmetric: bool
    bits: int = 4

    def __post_init__(self) -> None:
        if self.group not in (32, 64, 128):
            raise ValueError(f"int{self.bits}: group is {self.group!r}, expected 32, 64 or 128")
        if self.bits not in ((4, 5, 6) if self.symmetric else (4,)):
            raise ValueError(f"a weight of {self.bits} bits, expected 4, or of symmetric ones 5 or 6")

    @property
    def low(self) -> int:
        """The lowest symmetric level, and less 0 the code that stands for 0."""
        return -(1 << self.bits - 1)

    @property
    def high(self) -> int:
        """The highest symmetric level."""
        return -self.low - 1

    def fitted(self, groups: Tensor, importance: Tensor | None, kept: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Scale, in `kept`, and zero point of the least error that is found.  groups: [n, groups, group]."""
        counts = torch.ones(1, device=groups.device) if importance is None else _counts(importance)
        return (self._symmetric(groups, counts, kept), None) if self.symmetric else _asymmetric(groups, counts, kept)

    def codes(self, groups: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest codes, as floats."""
        shift = -self.low if zero is None else zero
        return (_quotient(groups, scale) + shift).round().clamp(0, (1 << self.bits) - 1)

    def values(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Levels that the codes represent."""
        return (codes - (-self.low if zero is None else zero)) * scale

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> PackedWeight:
        """The weight of codes [n, k]."""
        others = {} if zero is None else {"zero": zero.squeeze(-1).to(torch.uint8)}
        code = f"s{self.bits}" if zero is None else "u4"
        return PackedWeight.from_rows(code, codes.to(torch.uint8), scale.squeeze(-1), **others)

    def _symmetric(self, groups: Tensor, counts: Tensor, kept: torch.dtype) -> Tensor:
        """The scale of each group with the least squared error that was found."""
        at = groups.abs().argmax(-1, keepdim=True)
        extreme = groups.gather(-1, at)
        best = torch.zeros_like(extreme, dtype=kept)
        least = torch.full_like(extreme, torch.inf)
        for size in RANGES:
            for levels in (self.low, self.high):  # which end has the extreme value
                codes = _rounded(groups, extreme * (size / levels), self.low, self.high)
                best, least = self._better(groups, counts, _fitted(groups, counts, codes), best, least)
        for levels in (self.low, self.high):
            best, least = self._better(groups, counts, extreme / levels, best, least)
        return best

    def _better(
        self, groups: Tensor, counts: Tensor, scale: Tensor, best: Tensor, least: Tensor
    ) -> tuple[Tensor, Tensor]:
        scale = scale.to(best.dtype)
        error = _rounded(groups, scale, self.low, self.high).mul_(scale).sub_(groups)
        error = error.square_().mul_(counts).sum(-1, keepdim=True)
        return torch.where(error < least, scale, best), torch.minimum(error, least)


def _counts(importance: Tensor) -> Tensor:
    """Scale the importance to a mean of 1; columns that were never seen count a little."""
    mean = importance.float().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return importance.float() / mean + LEAST_IMPORTANCE


def _groups(what: str, weight: Tensor, group: int, levels: int) -> tuple[Tensor, torch.dtype]:
    """The weight in groups, fp32, and the dtype of its scales."""
    n, k = weight.shape
    if reason := why_not_in_blocks(n, k, group):
        raise ValueError(f"{what}: weight of shape [{n}, {k}]: {reason}")
    groups = weight.detach().float().unflatten(1, (k // group, group))
    largest = float(groups.abs().max()) / levels if groups.numel() else 0.0
    if not math.isfinite(largest):
        raise ValueError(f"{what}: weight has NaN or infinite values, expected finite ones")
    return groups, torch.float16 if SMALLEST <= largest <= LARGEST / 2 else torch.float32


def _quotient(groups: Tensor, scale: Tensor) -> Tensor:
    return groups / torch.where(scale == 0, 1.0, scale.float())


def _rounded(groups: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return _quotient(groups, scale).round().clamp(low, high)


def _fitted(groups: Tensor, counts: Tensor, codes: Tensor) -> Tensor:
    """The scale of least squares for these codes."""
    square = (counts * codes.square()).sum(-1, keepdim=True)
    return (counts * groups * codes).sum(-1, keepdim=True) / square.clamp(min=torch.finfo(torch.float32).tiny)


def _asymmetric(groups: Tensor, counts: Tensor, kept: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group, of several ranges; 0 is among the values that have a code of their own."""
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    best, best_zero = torch.zeros_like(low, dtype=kept), torch.zeros_like(low)
    least = torch.full_like(low, torch.inf)
    for size in (*RANGES, 1.0):
        scale = ((high - low) * (size / 15)).to(kept)
        zero = _quotient(-low * size, scale).round().clamp(0, 15)
        codes = (_quotient(groups, scale) + zero).round().clamp(0, 15) - zero
        for tried in (scale, _fitted(groups, counts, codes).to(kept)):
            shown = ((_quotient(groups, tried) + zero).round().clamp(0, 15) - zero) * tried
            error = (counts * (shown - groups).square()).sum(-1, keepdim=True)
            best, best_zero = torch.where(error < least, tried, best), torch.where(error < least, zero, best_zero)
            least = torch.minimum(error, least)
    return best, best_zero


DAMPING = 0.01
"""Fraction of the inputs' mean square added to each column's: products of few inputs have no inverse."""


def pack_groups_with_feedback(
    weight: Tensor, products: Tensor, count: int, group: int = 32, *, bits: int = 4, symmetric: bool = True
) -> PackedWeight:
    """`pack_groups`, each column's error made up for by those after it (GPTQ, Frantar et al. 2022, arXiv:2210.17323).

    products: [k, k], XᵀX of the inputs X [count, k] that the weight is multiplied with.  A group's scales are found for
    what its columns have become by then.  Groups come in the order of their inputs' mean square, and so do columns
    within one: those that count the most are rounded before they have others' errors to make up for.  Of SmolLM2-135M
    in groups of 64 and 128, that takes 6% off the KL divergence.
    What inputs have in common is believed as far as there are many: it is shrunk by count / (count + k).  Of SmolLM2's
    down_proj, 1,670 inputs without that made the error on others a quarter larger than `pack_groups` does, and 5%
    smaller with it.
    Raises as `pack_groups` does.
    """
    grid = Grid(group, symmetric, bits)
    groups, kept = _groups(f"int{bits}", weight, group, -grid.low)
    square = products.diagonal().double()
    order = _by_importance(square, group)
    believed = count / (count + len(square))
    own = (1 - believed) * square + DAMPING * square.mean() + (square == 0)
    damped = (believed * products.double() + torch.diag(own))[order][:, order]
    # Row j: what an error of 1 in column j asks of the later columns, in units of its first number.
    asked = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).float()
    rest = groups.flatten(1).T[order].contiguous()  # [k, n]: a column's numbers lie together
    codes, scales, zeros = torch.empty_like(rest), [], []
    for start in range(0, len(rest), group):
        end = start + group
        importance = square[order[start:end]].float()[None]
        scale, zero = grid.fitted(rest[start:end].T.contiguous()[:, None], importance, kept)
        scale_of, zero_of = scale[:, 0, 0].float(), None if zero is None else zero[:, 0, 0]
        errors = torch.empty_like(rest[start:end])
        for j in range(start, end):
            code = grid.codes(rest[j], scale_of, zero_of)
            error = (rest[j] - grid.values(code, scale_of, zero_of)) / asked[j, j]
            rest[j + 1 : end].addr_(asked[j, j + 1 : end], error, alpha=-1)
            codes[j], errors[j - start] = code, error
        rest[end:].addmm_(asked[start:end, end:].T, errors, alpha=-1)
        scales.append(scale)
        zeros += [] if zero is None else [zero]
    places, groups_at = order.argsort(), (order[::group] // group).argsort()
    zero = torch.cat(zeros, 1)[:, groups_at] if zeros else None
    return grid.packed(codes[places].T.contiguous(), torch.cat(scales, 1)[:, groups_at], zero)


def _by_importance(square: Tensor, group: int) -> Tensor:
    """Return the columns by descending mean square, group by group, and within each group."""
    groups = square.unflatten(0, (-1, group))
    columns = groups.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(0, len(square), group, device=square.device)
    return (columns + first[:, None])[groups.mean(-1).argsort(dim=0, descending=True, stable=True)].flatten()
