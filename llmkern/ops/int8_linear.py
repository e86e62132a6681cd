"""A linear layer whose weight is int8: W8A8 (LLM.int8(), arXiv:2208.07339) or weight-only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.checks import check_choice, check_floating, check_has_hidden, check_is_tensor, row_count
from llmkern.config import settings
from llmkern.dispatch import dispatch, known
from llmkern.library import define
from llmkern.ops.int8_matmul import ACTIVATIONS, check_weight

__all__ = ["int8_linear"]

SCHEMES = ("auto", "w8a8", "w8a16")
FEW_ROWS = 4
"""Up to here reading the weight is the whole cost; see `resolve_scheme`."""


def int8_linear(
    x: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    scheme: str = "auto",
) -> Tensor:
    """`activation(x · (w_q * w_scale)ᵀ + bias)` in x's dtype; at least fp32 inside, rounded once at the end.

    x: [..., K], fp32, bf16, fp16 or fp64, any strides.  w_q: [N, K] int8.  w_scale: fp32 [N, 1] or [N].
    bias: [N], any floating dtype.  activation: "none", "gelu", "gelu_tanh", "silu" or "relu".
    scheme: "w8a8" rounds each row of x to int8 (`quantize_int8`) and multiplies integers;
        "w8a16" (weight-only) takes x as it is;
        "auto": w8a16 for at most 4 rows on the CPU, else w8a8 (why: `resolve_scheme`).
    Returns [..., N], contiguous; any size may be 0.  Under w8a8 a row with NaN or infinity gives NaN in that row only.
    A row's bits never depend on the rows beside it under w8a8; under w8a16 and "auto" only by whether they are few, on
    the CPU not even so under LLMKERN_BATCH_INVARIANT=1, where "auto" is w8a8.
    Differentiable in x and bias; the weight is frozen.  dx is that of the floating-point product with the
    weight w_q * w_scale: rounding the activations is passed straight through (Bengio et al., arXiv:1308.3432).
    Raises TypeError for other dtypes, ValueError for other shapes, devices or values.
    """
    scheme = resolve_scheme(scheme, x)
    if isinstance(w_scale, Tensor) and w_scale.dim() == 1:
        _check(x, w_q, w_scale, bias, activation, scheme)  # as it was given: a refusal names its own shape
        w_scale = w_scale.unsqueeze(-1)
    return dispatch(
        "int8_linear", _check, x=x, w_q=w_q, w_scale=w_scale, bias=bias, activation=activation, scheme=scheme
    )


def _check(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, activation: str, scheme: str) -> None:
    op = "int8_linear"
    check_floating(op, x=x)
    check_has_hidden(op, "x", x)
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_choice(op, "scheme", scheme, SCHEMES)
    check_is_tensor(op, "w_scale", w_scale)
    check_weight(op, "x", x, w_q, w_scale, bias)


def resolve_scheme(scheme: str, x: Tensor) -> str:
    """Return the scheme that "auto" means for `x`, by device and rows alone, so that a call's numbers depend neither on
    timing nor on the backends at hand.

    On the CPU a few rows take about as long as reading the weight does, in either scheme, and rounding them to int8
    as well only loses accuracy; with more rows integer products are the faster the more rows there are.  PyTorch
    alone has no weight-only operator but in bf16: in fp32 and fp16 it dequantizes the weight first, so that without
    the native library "w8a8" is faster.  On other devices W8A8 always, and where a trace leaves the number open, and
    under LLMKERN_BATCH_INVARIANT=1.
    """
    if scheme != "auto" or not isinstance(x, Tensor) or x.dim() == 0:
        return scheme
    if settings.batch_invariant:  # one scheme for any number of rows
        return "w8a8"
    return "w8a16" if x.device.type == "cpu" and known(row_count(x) <= FEW_ROWS) else "w8a8"


def straight_through(
    dy: Tensor,
    x: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    scheme: str,
) -> tuple[Tensor, Tensor | None]:
    """Return (dx, dbias) of the floating-point linear layer with the dequantized weight."""
    if activation != "none":
        z = dispatch(
            "int8_linear",
            x=x,
            w_q=w_q,
            w_scale=w_scale,
            bias=bias,
            activation="none",
            scheme=scheme,
        )
        dy = activation_backward(dy, z, activation)
    weight = (w_q * w_scale).to(dy.dtype)
    dx = (dy.reshape(-1, dy.shape[-1]) @ weight).view(x.shape)
    dbias = None if bias is None else dy.sum(tuple(range(dy.dim() - 1)), dtype=bias.dtype)
    return dx, dbias


def activation_backward(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """Return the gradient of `activate(z, activation)` in z, for an activation other than "none"."""
    if activation == "silu":
        if torch.is_grad_enabled():  # to be differentiated again, for which PyTorch's operator has no formula
            s = torch.sigmoid(z)
            return dy * s * (1 + z * (1 - s))
        return torch.ops.aten.silu_backward(dy, z)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, z, 0)
    return dispatch("gelu_backward", dy=dy, x=z, approximate="tanh" if activation == "gelu_tanh" else "none")


def _fake(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, activation: str, scheme: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], w_q.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w_q, w_scale, bias, ctx.activation, ctx.scheme = inputs
    ctx.save_for_backward(x, w_q, w_scale, bias)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, w_q, w_scale, bias = ctx.saved_tensors
    dx, dbias = straight_through(dy, x, w_q, w_scale, bias, ctx.activation, ctx.scheme)
    return dx, None, None, dbias, None, None


define(
    "int8_linear(Tensor x, Tensor w_q, Tensor w_scale, Tensor? bias, str activation, str scheme) -> Tensor",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
