"""Rotary position embedding of queries and keys (RoFormer, Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.checks import (
    broadcasts,
    check_flag,
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
    shape_text,
)
from llmkern.dispatch import dispatch
from llmkern.library import define

__all__ = ["rope"]


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate the first R = rotary_dim dimensions of every head; the others pass through unchanged.

    q: [B, Hq, S, D], k: [B, Hkv, S, D], fp32, bf16, fp16 or fp64, the same dtype, any strides.
    cos, sin: [B or 1, S, W] or [S, W], any floating dtype, the same for both.
    rotary_dim: even, at most D.  None for W: cos and sin have one value per rotated dimension, as transformers
        passes them.  Or 2·W: they have one value per pair of dimensions, as gpt-oss passes them (W = D/2).
    interleaved: False pairs dimension i with i + R/2 ("half" form: Llama, GPT-NeoX, Phi-3, gpt-oss), True pairs
        2i with 2i + 1 (GPT-J, Cohere, GLM).
    For a pair (a, b):  out[a] = x[a]·cos[a] − x[b]·sin[a],  out[b] = x[b]·cos[b] + x[a]·sin[b],  in fp32.
    With one value per dimension each is used as it stands; nothing assumes that the two of a pair are equal.

    Returns the rotated (q, k), contiguous, in their shapes and dtype.  Differentiable in q and k.
    Raises TypeError for other dtypes, ValueError for other shapes, devices or rotary_dim, and where cos or sin
    requires a gradient (there is none: detach them).
    """
    if isinstance(cos, Tensor) and cos.dim() == 2:
        cos = cos.unsqueeze(0)
    if isinstance(sin, Tensor) and sin.dim() == 2:
        sin = sin.unsqueeze(0)
    if rotary_dim is None:
        rotary_dim = cos.shape[-1] if isinstance(cos, Tensor) and cos.dim() else 0
    return dispatch("rope", _check, q=q, k=k, cos=cos, sin=sin, rotary_dim=rotary_dim, interleaved=interleaved)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> None:
    check_floating("rope", q=q, k=k, cos=cos, sin=sin)
    check_flag("rope", interleaved=interleaved)
    check_same_dtype("rope", "q", q, k=k)
    check_same_dtype("rope", "cos", cos, sin=sin)
    check_same_device("rope", "q", q, k=k, cos=cos, sin=sin)
    if q.dim() != 4:
        raise ValueError(f"rope: q has shape {shape_text(q.shape)}, expected [B, Hq, S, D]")
    batch, _, length, dim = q.shape
    heads = k.shape[1] if k.dim() == 4 else 1
    check_shape("rope", "k", k, (batch, heads, length, dim), "q's batch, length and head dimension")
    if cos.dim() != 3 or not broadcasts(cos.shape[0], batch) or cos.shape[1] != length:
        expected = f"[{batch} or 1, {length}, W] or [{length}, W]"
        raise ValueError(f"rope: cos has shape {shape_text(cos.shape)}, expected {expected}")
    check_shape("rope", "sin", sin, cos.shape, "the shape of cos")
    width = cos.shape[-1]
    if rotary_dim not in (width, 2 * width):
        raise ValueError(f"rope: rotary_dim is {rotary_dim}, expected {width} or {2 * width} (cos has width {width})")
    if rotary_dim % 2 or not 0 < rotary_dim <= dim:
        raise ValueError(f"rope: {rotary_dim} dimensions to rotate, expected an even number from 2 to {dim}")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("rope: cos or sin requires a gradient, and there is none in them: detach them")


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.rotary_dim, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    """Rotate back: the transpose is a rotation by −sin with the two values of each pair exchanged."""
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        raise RuntimeError("rope has no gradient in cos and sin: detach them")
    cos, sin = ctx.saved_tensors
    if sin.shape[-1] == ctx.rotary_dim:
        sin = sin.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if ctx.interleaved else sin.roll(ctx.rotary_dim // 2, -1)
    dq, dk = dispatch("rope", q=dq, k=dk, cos=cos, sin=-sin, rotary_dim=ctx.rotary_dim, interleaved=ctx.interleaved)
    return dq, dk, None, None, None, None


define(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, int rotary_dim, bool interleaved)"
    " -> (Tensor q_out, Tensor k_out)",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
