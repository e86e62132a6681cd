"""A linear layer whose weight is packed in blocks: int4 to int8, GGUF's K-quants (llmkern/packed.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.checks import (
    FLOATING,
    check_choice,
    check_dtype,
    check_floating,
    check_has_hidden,
    check_is_tensor,
    check_same_device,
    check_shape,
    given,
    row_count,
)
from llmkern.dispatch import dispatch
from llmkern.library import define
from llmkern.ops.int8_linear import activation_backward
from llmkern.ops.int8_matmul import ACTIVATIONS
from llmkern.packed import BLOCK, CODES, PANEL, PackedWeight

__all__ = ["quantized_linear"]

SCHEMES = ("a8", "a16")


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    offset: Tensor | None = None,
    super_scale: Tensor | None = None,
    super_offset: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    code: str,
    n: int,
    activation: str = "none",
    scheme: str = "a8",
) -> Tensor:
    """`activation(x · weightᵀ + bias) + residual` in x's dtype; at least fp32 inside, rounded once at the end.

    x: [..., K], fp32, bf16, fp16 or fp64, any strides; K is a multiple of 32.
    codes, scale, zero, offset, super_scale, super_offset, code, n: the weight [n, K], as `llmkern.packed.PackedWeight`
        has it: weight = scale · super_scale · (level − zero) + offset · super_offset.
    bias: [n]; residual: [..., n]; any floating dtype.
    activation: "none", "gelu", "gelu_tanh", "silu" or "relu"; it acts before the residual is added.
    scheme: "a8" rounds each 32 neighbours of x to int8, amax / 127 (`quantize_int8` of a block); llama.cpp's Q8_0.
        "a16" takes x as it is.
    Returns [..., n], contiguous; any size may be 0.  Under "a8" NaN and infinity in x make their row NaN.
    Differentiable in x, bias and residual; the weight is frozen.  dx is that of the floating-point product: rounding
    x is passed straight through (Bengio et al., arXiv:1308.3432).
    Raises TypeError for other dtypes, ValueError for other shapes, devices or values.
    """
    return dispatch(
        "quantized_linear",
        _check,
        x=x,
        codes=codes,
        scale=scale,
        zero=zero,
        offset=offset,
        super_scale=super_scale,
        super_offset=super_offset,
        bias=bias,
        residual=residual,
        code=code,
        n=n,
        activation=activation,
        scheme=scheme,
    )


def _check(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    super_scale: Tensor | None,
    super_offset: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    code: str,
    n: int,
    activation: str,
    scheme: str,
) -> None:
    op = "quantized_linear"
    check_floating(op, x=x)
    check_has_hidden(op, "x", x)
    check_choice(op, "code", code, tuple(CODES))
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_choice(op, "scheme", scheme, SCHEMES)
    check_dtype(op, "codes", codes, torch.uint8)
    form = CODES[code]
    if codes.dim() != 3 or codes.shape[2] != form.block_bytes:
        raise ValueError(
            f"{op}: codes has shape {list(codes.shape)}, expected [panels, K / {BLOCK}, {form.block_bytes}] "
            f"of code {code!r}"
        )
    panels, k = codes.shape[0], codes.shape[1] * BLOCK
    if k != x.shape[-1]:
        raise ValueError(f"{op}: codes has K = {k}, expected {x.shape[-1]} (the last dimension of x)")
    if not isinstance(n, int) or -(-n // PANEL) != panels or n < 0:
        raise ValueError(f"{op}: n is {n!r}, expected the rows of {panels} panels of {PANEL}")
    of_eight_bits = (torch.int8, torch.uint8)
    for name, value, of_them in (("scale", scale, super_scale), ("offset", offset, super_offset)):
        if name == "scale":
            check_is_tensor(op, name, value)
        if value is not None:
            accepted = FLOATING if of_them is None else (*FLOATING, *of_eight_bits)
            check_dtype(op, name, value, *accepted)
            _check_groups(op, name, value, panels, k, form.smallest_group)
    if zero is not None:
        check_dtype(op, "zero", zero, torch.uint8)
        check_shape(op, "zero", zero, scale.shape, "the shape of scale")
        if form.shift or form.table or form.bits == 8:
            raise ValueError(f"{op}: zero is given with code {code!r}, expected 'u4' or 'u5'")
    if offset is not None:
        check_shape(op, "offset", offset, scale.shape, "the shape of scale")
    for name, value, multiplied in (
        ("super_scale", super_scale, scale),
        ("super_offset", super_offset, offset),
    ):
        if value is not None:
            check_floating(op, **{name: value})
            if multiplied is None:
                raise ValueError(f"{op}: super_offset is given without an offset")
            _check_groups(op, name, value, panels, k, form.smallest_group)
    check_floating(op, **given(bias=bias, residual=residual))
    check_shape(op, "bias", bias, (n,), "one value per row of the weight")
    check_shape(op, "residual", residual, (*x.shape[:-1], n), "the shape of the result")
    others = given(zero=zero, offset=offset, super_scale=super_scale, super_offset=super_offset)
    check_same_device(op, "x", x, codes=codes, scale=scale, **others, bias=bias, residual=residual)


def _check_groups(op: str, name: str, value: Tensor, panels: int, k: int, smallest: int) -> None:
    """[panels, groups, 16], where the groups are equal, whole blocks of 32, or as small as the codes allow."""
    shape = tuple(value.shape)
    groups = shape[1] if len(shape) == 3 else 0
    whole = k == groups == 0 or (groups > 0 and k % groups == 0)
    size = k // groups if groups else 0
    if len(shape) != 3 or (shape[0], shape[2]) != (panels, PANEL) or not whole or (size % BLOCK and size != smallest):
        raise ValueError(
            f"{op}: {name} has shape {list(shape)}, expected [{panels}, groups, {PANEL}] with equal groups of K = {k} "
            f"that are multiples of {BLOCK}{'' if smallest == BLOCK else f', or of {smallest}'}"
        )


def straight_through(dy: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (dx, dbias, dresidual) of the floating-point linear layer with the dequantized weight."""
    x, bias, residual = call["x"], call["bias"], call["residual"]
    dresidual = None if residual is None else dy.to(residual.dtype)
    if call["activation"] != "none":
        z = dispatch("quantized_linear", **{**call, "residual": None, "activation": "none"})
        dy = activation_backward(dy, z, call["activation"])
    weight = packed_of(call).dequantized().to(dy.dtype)
    dx = (dy.reshape(row_count(dy), weight.shape[0]) @ weight).view(x.shape)
    return dx, None if bias is None else dy.sum(tuple(range(dy.dim() - 1)), dtype=bias.dtype), dresidual


def packed_of(call: dict[str, Any]) -> PackedWeight:
    """Return the packed weight of a call."""
    names = ("code", "n", "codes", "scale", "zero", "offset", "super_scale", "super_offset")
    return PackedWeight(**{name: call[name] for name in names})


ARGUMENTS = (
    "x", "codes", "scale", "zero", "offset", "super_scale", "super_offset", "bias", "residual", "code", "n",
    "activation", "scheme",
)  # fmt: skip
_TENSORS = ARGUMENTS[:9]


def _fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: Tensor | None,
    super_scale: Tensor | None,
    super_offset: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    code: str,
    n: int,
    activation: str,
    scheme: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: len(_TENSORS)])
    ctx.plain = inputs[len(_TENSORS) :]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dbias, dresidual = straight_through(dy, dict(zip(ARGUMENTS, (*ctx.saved_tensors, *ctx.plain), strict=True)))
    return dx, None, None, None, None, None, None, dbias, dresidual, None, None, None, None


define(
    "quantized_linear(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? offset, Tensor? super_scale, "
    "Tensor? super_offset, Tensor? bias, Tensor? residual, str code, int n, str activation, str scheme) -> Tensor",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
