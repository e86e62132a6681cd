"""int8 matrix product with exact s32 accumulation and the dequantization fused behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.checks import (
    check_choice,
    check_dtype,
    check_floating,
    check_has_hidden,
    check_same_device,
    check_shape,
    given,
)
from llmkern.dispatch import dispatch
from llmkern.library import define

__all__ = ["int8_matmul"]

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "relu")
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32)
MAX_K = (2**31 - 1) // 2**14
"""Beyond this many products of -128 · -128 an s32 accumulator can overflow."""


def int8_matmul(
    a_q: Tensor,
    w_q: Tensor,
    a_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`activation((a_q · w_qᵀ) * a_scale * w_scale + bias) + residual`, accumulated exactly in s32.

    a_q: [..., K] int8, any strides.  w_q: [N, K] int8.  K is at most 131,071, so that s32 cannot overflow.
    a_scale: fp32 [..., 1], one per row; w_scale: fp32 [N, 1] or [N], one per output channel; None for 1.
    bias: [N]; residual: [..., N]; any floating dtype.
    activation: "none", "gelu" (exact), "gelu_tanh", "silu" or "relu"; it acts before the residual is added.
    out_dtype: float32 (the default), bfloat16 or float16; everything behind the accumulation is computed in fp32
        and rounded once.  int32 returns the accumulators, and then nothing but a_q and w_q may be given.
    Returns [..., N], contiguous; any size may be 0.  A NaN scale makes its row or channel NaN.  No gradient.
    Raises TypeError for other dtypes, ValueError for other shapes, devices or values.
    """
    out_dtype = torch.float32 if out_dtype is None else out_dtype
    if isinstance(w_scale, Tensor) and w_scale.dim() == 1:
        # As it was given: a refusal names its own shape.
        _check(a_q, w_q, a_scale, w_scale, bias, residual, activation, out_dtype)
        w_scale = w_scale.unsqueeze(-1)
    return dispatch(
        "int8_matmul",
        _check,
        a_q=a_q,
        w_q=w_q,
        a_scale=a_scale,
        w_scale=w_scale,
        bias=bias,
        residual=residual,
        activation=activation,
        out_dtype=out_dtype,
    )


def _check(
    a_q: Tensor,
    w_q: Tensor,
    a_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> None:
    op = "int8_matmul"
    check_dtype(op, "a_q", a_q, torch.int8)
    check_has_hidden(op, "a_q", a_q)
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"{op}: out_dtype is {out_dtype}, expected float32, bfloat16, float16 or int32")
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_weight(op, "a_q", a_q, w_q, w_scale, bias)
    if a_scale is not None:
        check_dtype(op, "a_scale", a_scale, torch.float32)
        check_shape(op, "a_scale", a_scale, (*a_q.shape[:-1], 1), "one scale per row of a_q")
    check_floating(op, **given(residual=residual))
    check_shape(op, "residual", residual, (*a_q.shape[:-1], w_q.shape[0]), "the shape of the result")
    check_same_device(op, "a_q", a_q, a_scale=a_scale, residual=residual)
    if out_dtype == torch.int32:
        for name, value in (("a_scale", a_scale), ("w_scale", w_scale), ("bias", bias), ("residual", residual)):
            if value is not None:
                raise ValueError(f"{op}: {name} is given with out_dtype=int32, which returns the bare accumulators")
        if activation != "none":
            raise ValueError(f"{op}: activation is {activation!r}, expected 'none' with out_dtype=int32")


def check_weight(
    op: str, lead_name: str, lead: Tensor, w_q: Tensor, w_scale: Tensor | None, bias: Tensor | None
) -> None:
    """Check the weight's arguments, which int8_matmul and int8_linear share."""
    check_dtype(op, "w_q", w_q, torch.int8)
    if w_q.dim() != 2:
        raise ValueError(f"{op}: w_q has {w_q.dim()} dimensions, expected [N, K]")
    n, k = w_q.shape
    if lead.shape[-1] != k:
        raise ValueError(f"{op}: w_q has K = {k}, expected {lead.shape[-1]} (the last dimension of {lead_name})")
    if k > MAX_K:
        raise ValueError(f"{op}: K is {k}, at most {MAX_K} is accepted: a longer s32 accumulation can overflow")
    if w_scale is not None:
        check_dtype(op, "w_scale", w_scale, torch.float32)
        check_shape(op, "w_scale", w_scale, (n, 1)[: max(w_scale.dim(), 1)], "one scale per row of w_q")
    check_floating(op, **given(bias=bias))
    check_shape(op, "bias", bias, (n,), "one value per row of w_q")
    check_same_device(op, lead_name, lead, w_q=w_q, w_scale=w_scale, bias=bias)


def activate(z: Tensor, activation: str) -> Tensor:
    """Apply the named activation to `z`."""
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "silu":
        return F.silu(z)
    return F.relu(z) if activation == "relu" else z


def _fake(
    a_q: Tensor,
    w_q: Tensor,
    a_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return a_q.new_empty((*a_q.shape[:-1], w_q.shape[0]), dtype=out_dtype)


define(
    "int8_matmul(Tensor a_q, Tensor w_q, Tensor? a_scale, Tensor? w_scale, Tensor? bias, Tensor? residual, "
    "str activation, ScalarType out_dtype) -> Tensor",
    fake=_fake,
)
