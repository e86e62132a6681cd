"""What the ops that compute a whole transformer layer share: their linear layers, floating point or int8."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkern.checks import (
    broadcasts,
    check_choice,
    check_dtype,
    check_floating,
    check_is_tensor,
    check_same_device,
    check_same_dtype,
    check_shape,
    given,
    shape_text,
)
from llmkern.ops.int8_linear import SCHEMES, resolve_scheme

__all__ = ["check_hidden", "check_layer_mask", "check_linear", "check_matrix", "check_schemes", "resolve_schemes"]


def check_hidden(op: str, hidden: Tensor) -> None:
    """hidden is floating, [B, S, hidden]."""
    check_floating(op, hidden=hidden)
    if hidden.dim() != 3:
        raise ValueError(f"{op}: hidden has shape {shape_text(hidden.shape)}, expected [B, S, hidden]")


def resolve_schemes(schemes: str | Sequence[str], hidden: Tensor) -> str:
    """`scheme` as the ops' schemas take it: one for all int8 weights, or one for each linear layer with commas."""
    if isinstance(schemes, str):
        schemes = schemes.split(",")
    return ",".join([resolve_scheme(scheme, hidden) for scheme in schemes])


def check_schemes(op: str, schemes: str, linears: tuple[str, ...]) -> None:
    """`schemes` is one of int8_linear's schemes, or as many as there are linear layers."""
    each = schemes.split(",")
    for scheme in each:
        check_choice(op, "scheme", scheme, SCHEMES)
    if len(each) not in (1, len(linears)):
        raise ValueError(f"{op}: scheme has {len(each)} parts, expected one, or one for each of {', '.join(linears)}")


def check_matrix(op: str, name: str, weight: Tensor) -> None:
    """A tensor of two dimensions."""
    check_is_tensor(op, name, weight)
    if weight.dim() != 2:
        raise ValueError(f"{op}: {name} has shape {shape_text(weight.shape)}, expected [N, K]")


def check_linear(
    op: str, name: str, like: Tensor, into: tuple[int, int], weight: Tensor, scale: Tensor | None, bias: Tensor | None
) -> None:
    """A linear layer of sizes `into` = (out, in): a weight in like's dtype, or int8 codes with a scale per output."""
    shape = {f"{name}_weight": weight, f"{name}_bias": bias}
    if scale is None:
        check_floating(op, **{f"{name}_weight": weight})
        check_same_dtype(op, "hidden", like, **{f"{name}_weight": weight})
    else:
        check_dtype(op, f"{name}_weight", weight, torch.int8)
        check_dtype(op, f"{name}_scale", scale, torch.float32)
        check_shape(op, f"{name}_scale", scale, (into[0], 1), f"one per row of {name}_weight")
    check_shape(op, f"{name}_weight", weight, into)
    check_floating(op, **given(**{f"{name}_bias": bias}))
    check_shape(op, f"{name}_bias", bias, into[:1], f"one per row of {name}_weight")
    check_same_device(op, "hidden", like, **shape, **{f"{name}_scale": scale})


def check_layer_mask(op: str, mask: Tensor | None, like: Tensor, full: tuple[int, int, int, int]) -> None:
    """The mask, where given, is bool or floating with 4 dimensions that broadcast to `full`."""
    if mask is None:
        return
    check_dtype(op, "mask", mask, *dict.fromkeys((torch.bool, like.dtype, torch.float32)))
    check_same_device(op, "hidden", like, mask=mask)
    if mask.dim() != 4 or not all([broadcasts(*sizes) for sizes in zip(mask.shape, full, strict=True)]):
        raise ValueError(
            f"{op}: mask has shape {shape_text(mask.shape)}, expected one of 4 dimensions that broadcasts to "
            f"{shape_text(full)} (batch, query heads, queries, keys)"
        )
