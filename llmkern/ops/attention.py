"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762), with masks, windows, softcap and sinks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from llmkern.checks import (
    broadcasts,
    check_dtype,
    check_finite,
    check_flag,
    check_floating,
    check_non_negative,
    check_same_device,
    check_same_dtype,
    check_shape,
    shape_text,
)
from llmkern.dispatch import dispatch
from llmkern.library import define

__all__ = ["attention"]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = False,
    sm_scale: float | None = None,
    window: int | Sequence[int] | None = None,
    softcap: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = False,
    sm_scale: float | None = None,
    window: int | Sequence[int] | None = None,
    softcap: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = False,
    sm_scale: float | None = None,
    window: int | Sequence[int] | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`softmax(mask(softcap · tanh(q·kᵀ · sm_scale / softcap))) · v`; softmax and sums in fp32, in fp64 for fp64.

    q: [B, Hq, Sq, D], fp32, bf16, fp16 or fp64, any strides.
    k: [B, Hkv, Skv, D], v: [B, Hkv, Skv, Dv]; Hq is a multiple of Hkv, query head h reads head h // (Hq / Hkv).
    attn_mask: broadcastable to [B, Hq, Sq, Skv]; bool (True: attend), or q's dtype or fp32 (added to the scaled and
        capped scores).  It is read through its strides, never expanded in memory.
    key_padding_mask: bool [B, Skv], True for a real key.
    sinks: [Hq], any floating dtype; one more logit in each softmax's denominator, without a value (gpt-oss).
    causal: query i sees keys j <= i + Skv − Sq, so the last query sees the last key (flash-attention's alignment).
    sm_scale: default 1/sqrt(D).
    window: (left, right) keys around a query's own position i + Skv − Sq, −1 for no limit, as in flash-attention;
        an int W stands for (W − 1, W − 1), which with `causal` is transformers' sliding_window.
    softcap: 0 or None for none (Gemma 2).
    Returns out [B, Hq, Sq, Dv] in q's dtype, in the memory order [B, Sq, Hq, Dv] that an output projection reads (so
    `out.transpose(1, 2)` is contiguous); with `return_lse` also the log-sum-exp of each row's scores, sinks included,
    [B, Hq, Sq] in fp32 (fp64 for fp64).

    A query that sees no key gets 0 and −inf (with sinks: 0, and the sink as log-sum-exp).  A NaN or infinity in k or v
    reaches the queries that see it; what one behind a mask does is unspecified, as in PyTorch: keep padding finite.
    Differentiable in q, k, v, a floating attn_mask and sinks, through out and through the log-sum-exp.
    Raises TypeError for other dtypes, ValueError for other shapes, devices or values.
    """
    if isinstance(attn_mask, Tensor) and attn_mask.dim() < 4:
        _check(q, k, v, attn_mask, None, None, 1.0, 0.0)  # as it was given: a refusal names its own shape
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    out, lse = dispatch(
        "attention",
        _check,
        q=q,
        k=k,
        v=v,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        sinks=sinks,
        causal=causal,
        sm_scale=default_scale(q) if sm_scale is None else sm_scale,
        window=[-1, -1] if window is None else window_of("attention", window),
        softcap=0.0 if softcap is None else softcap,
        return_lse=return_lse,
    )
    return (out, lse) if return_lse else out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    sinks: Tensor | None,
    sm_scale: float,
    softcap: float,
    causal: bool = False,
    return_lse: bool = False,
    **_: Any,
) -> None:
    check_heads("attention", q, k, v, "k", "v")
    check_flag("attention", causal=causal, return_lse=return_lse)
    check_numbers("attention", sm_scale, softcap)
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    if k.shape[0] != batch:
        raise ValueError(f"attention: k has batch size {k.shape[0]}, expected {batch} (q's)")
    if attn_mask is not None:
        _check_mask(attn_mask, q, (batch, heads, queries, keys))
    if key_padding_mask is not None:
        check_dtype("attention", "key_padding_mask", key_padding_mask, torch.bool)
        check_shape("attention", "key_padding_mask", key_padding_mask, (batch, keys), "k's batch and length")
        check_same_device("attention", "q", q, key_padding_mask=key_padding_mask)
    check_sinks("attention", q, sinks)


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, k_name: str, v_name: str, *, codes: bool = False) -> None:
    """Check dtypes, devices, ranks, heads and head dimensions; k and v may be a cache, of any batch size.

    codes: k and v are int8 instead of q's dtype.
    """
    check_floating(op, q=q)
    if codes:
        check_dtype(op, k_name, k, torch.int8)
        check_dtype(op, v_name, v, torch.int8)
    else:
        check_floating(op, **{k_name: k, v_name: v})
    for name, tensor in (("q", q), (k_name, k), (v_name, v)):
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} has shape {shape_text(tensor.shape)}, expected 4 dimensions")
    if not codes:
        check_same_dtype(op, "q", q, **{k_name: k, v_name: v})
    check_same_device(op, "q", q, **{k_name: k, v_name: v})
    if q.shape[3] == 0 or k.shape[3] != q.shape[3]:
        raise ValueError(f"{op}: {k_name} has head dimension {k.shape[3]}, expected {max(q.shape[3], 1)} (q's)")
    check_shape(op, v_name, v, (*k.shape[:3], v.shape[3]), f"that of {k_name} but for the last dimension")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: q has {q.shape[1]} heads, expected a multiple of {k_name}'s {k.shape[1]}")


def check_sinks(op: str, q: Tensor, sinks: Tensor | None) -> None:
    """Check that `sinks`, if given, is floating, on q's device, one number for each of q's heads."""
    if sinks is None:
        return
    check_floating(op, sinks=sinks)
    check_shape(op, "sinks", sinks, (q.shape[1],), "q's heads")
    check_same_device(op, "q", q, sinks=sinks)


def check_numbers(op: str, sm_scale: float, softcap: float) -> None:
    """Check that sm_scale is finite and softcap not negative."""
    check_finite(op, "sm_scale", sm_scale)
    check_non_negative(op, "softcap", softcap)


def default_scale(q: Tensor) -> float:
    """Return 1/sqrt(D); 1 for a q without a head dimension, which `check_heads` refuses."""
    return q.shape[-1] ** -0.5 if isinstance(q, Tensor) and q.dim() and q.shape[-1] else 1.0


def window_of(op: str, window: int | Sequence[int] | None) -> list[int]:
    """Return `window` as [left, right], −1 for no limit."""
    if window is None:
        return [-1, -1]
    if isinstance(window, int) and not isinstance(window, bool) and window >= 1:
        return [window - 1, window - 1]
    if isinstance(window, (list, tuple)) and len(window) == 2 and all([isinstance(n, int) for n in window]):
        left, right = window
        if left >= -1 and right >= -1:
            return [left, right]
    raise ValueError(f"{op}: window is {window!r}, expected an int >= 1 or (left, right) with ints >= -1")


def _check_mask(attn_mask: Tensor, q: Tensor, full: tuple[int, ...]) -> None:
    """Check that the mask is bool or floating, on q's device, and broadcasts to the shape of the scores."""
    check_dtype("attention", "attn_mask", attn_mask, *dict.fromkeys((torch.bool, q.dtype, torch.float32)))
    check_same_device("attention", "q", q, attn_mask=attn_mask)
    missing = len(full) - attn_mask.dim()
    fits = missing >= 0 and all([broadcasts(*sizes) for sizes in zip(attn_mask.shape, full[missing:], strict=True)])
    if not fits:
        raise ValueError(
            f"attention: attn_mask has shape {shape_text(attn_mask.shape)}, "
            f"expected one that broadcasts to {shape_text(full)} (batch, q's heads, queries, keys)"
        )


def out_like(q: Tensor, v: Tensor) -> Tensor:
    """Allocate `out`: [B, Hq, Sq, Dv] in the memory order [B, Sq, Hq, Dv]."""
    batch, heads, queries, _ = q.shape
    dim = v.shape[3]
    strides = (queries * heads * dim, dim, heads * dim, 1)
    return torch.empty_strided((batch, heads, queries, dim), strides, dtype=q.dtype, device=q.device)


def in_token_order(out: Tensor) -> Tensor:
    """Return `out` [B, Hq, Sq, Dv] in the memory order [B, Sq, Hq, Dv]; itself if it has that order."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def lse_like(q: Tensor, return_lse: bool) -> Tensor:
    """Allocate the log-sum-exp for q; it has 0 elements if none is wanted."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[:3] if return_lse else 0, dtype=dtype)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    sm_scale: float,
    window: Sequence[int],
    softcap: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    return out_like(q, v), lse_like(q, return_lse)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, attn_mask, key_padding_mask, sinks, ctx.causal, ctx.sm_scale, ctx.window, ctx.softcap, return_lse = inputs
    out, lse = output
    if not return_lse:
        ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, attn_mask, key_padding_mask, sinks, out, lse)


def _backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, attn_mask, key_padding_mask, sinks, out, lse = ctx.saved_tensors
    mask_grad, sinks_grad = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
    dq, dk, dv, dmask, dsinks = dispatch(
        "attention_backward",
        dout=dout,
        dlse=dlse,
        q=q,
        k=k,
        v=v,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        sinks=sinks,
        out=out,
        lse=lse,
        causal=ctx.causal,
        sm_scale=ctx.sm_scale,
        window=ctx.window,
        softcap=ctx.softcap,
        mask_grad=mask_grad,
    )
    unused = (None,) * 5  # causal, sm_scale, window, softcap, return_lse
    return dq, dk, dv, dmask if mask_grad else None, None, dsinks if sinks_grad else None, *unused


def _fake_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    sm_scale: float,
    window: Sequence[int],
    softcap: float,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        attn_mask.new_empty(attn_mask.shape) if attn_mask is not None and mask_grad else q.new_empty(0),
        q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape),
    )


# attn_mask has 4 dimensions, each 1 or that of [B, Hq, Sq, Skv].  window is [left, right], -1 for no limit; causal
# limits right to 0 besides.  softcap 0: no cap.  Without return_lse the second result has 0 elements.
define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? key_padding_mask, Tensor? sinks, bool causal,"
    " float sm_scale, int[] window, float softcap, bool return_lse) -> (Tensor out, Tensor lse)",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
# dlse and lse have 0 elements where the forward returned none.  dmask has attn_mask's own shape, and 0 elements
# without mask_grad; dsinks has 0 elements without sinks.
define(
    "attention_backward(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor? attn_mask,"
    " Tensor? key_padding_mask, Tensor? sinks, Tensor out, Tensor lse, bool causal, float sm_scale, int[] window,"
    " float softcap, bool mask_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dsinks)",
    fake=_fake_backward,
)
