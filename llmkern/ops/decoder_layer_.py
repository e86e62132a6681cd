"""A whole decoder layer of the Llama family (Touvron et al. 2023, arXiv:2302.13971) in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern.checks import (
    broadcasts,
    check_choice,
    check_dtype,
    check_finite,
    check_floating,
    check_non_negative,
    check_same_device,
    check_same_dtype,
    check_shape,
    given,
    shape_text,
)
from llmkern.dispatch import dispatch
from llmkern.library import define
from llmkern.ops._layer import (
    check_hidden,
    check_layer_mask,
    check_linear,
    check_matrix,
    check_schemes,
    resolve_schemes,
)
from llmkern.ops.attention import check_numbers

__all__ = ["decoder_layer_"]

GATES = ("silu", "gelu", "gelu_tanh")
_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


def decoder_layer_(
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    head_dim: int,
    input_norm: Tensor,
    post_norm: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    o_weight: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    k_cache_scale: Tensor | None = None,
    v_cache_scale: Tensor | None = None,
    past: int = 0,
    mask: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    q_scale: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_scale: Tensor | None = None,
    v_bias: Tensor | None = None,
    o_scale: Tensor | None = None,
    o_bias: Tensor | None = None,
    gate_scale: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_scale: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_scale: Tensor | None = None,
    down_bias: Tensor | None = None,
    eps: float = 1e-6,
    norm_offset: float = 0.0,
    interleaved: bool = False,
    sm_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    activation: str = "silu",
    scheme: str | Sequence[str] = "auto",
) -> Tensor:
    """`h + down(act(gate(n)) * up(n))` with `h = hidden + o(attention(rope(q, k), v))`, `n = rms_norm(h)`; q, k and v
    are the projections of `rms_norm(hidden)`, and keys and values join the cache before they are attended to.

    hidden: [B, S, H], fp32, bf16, fp16 or fp64; the layer's residual stream.
    cos, sin: [B or 1, S, W], one value per rotated dimension; W at most head_dim.  interleaved: as in `rope`.
    head_dim: D.  The numbers of heads follow from the rows of q_weight (Hq·D) and k_weight (Hkv·D).
    <name>_weight: [out, in] in hidden's dtype, or int8 with <name>_scale, fp32 [out, 1], as for `int8_linear`;
        <name>_bias: [out].  Any strides: rows of a packed projection pass as they are.
    input_norm, post_norm: [H]; q_norm, k_norm: [D], applied to every head before the rotation (Qwen3).
        eps and norm_offset (1.0 for Gemma, see `rms_norm`): of all of them.
    k_cache, v_cache: [B, Hkv, capacity, D] in hidden's dtype, **written**: the new tokens' keys and values are put at
        positions past … past + S − 1; the positions before are read, those after never.  None: there is no past.
        Or int8 with k_cache_scale and v_cache_scale, fp32 [B, Hkv, capacity]: each head of each token is rounded as
        `quantize_int8` does.  The attention sees the rounded values, but where there is no past the tokens as they are.
    past: tokens in the cache.
    mask: 4 dimensions that broadcast to [B, Hq, S, past + S]; bool (True: attend), or hidden's dtype or fp32 (added).
        It says everything; None: causal, and within `window` keys, its own included.
    sm_scale: default 1/sqrt(D).  softcap: of the scores, 0 or None for none.
    activation: "silu", "gelu" or "gelu_tanh".
    scheme: of the int8 weights, as for `int8_linear`; one for all, or one for each linear layer in the order of the
        arguments (q, k, v, o, gate, up, down).
    Returns [B, S, H], contiguous, in hidden's dtype.  Sums and norms are in fp32 (fp64 for fp64); between the layer's
    parts values are rounded to hidden's dtype, or not at all.  A sequence's bits depend on the sequences beside it as a
    row's do in `linear` and `int8_linear`.
    No gradient.  Raises TypeError for other dtypes, ValueError for other shapes, devices or values.
    """
    return dispatch(
        "decoder_layer_",
        _check,
        hidden=hidden,
        cos=cos,
        sin=sin,
        k_cache=k_cache,
        v_cache=v_cache,
        k_cache_scale=k_cache_scale,
        v_cache_scale=v_cache_scale,
        past=past,
        mask=mask,
        input_norm=input_norm,
        post_norm=post_norm,
        q_norm=q_norm,
        k_norm=k_norm,
        q_weight=q_weight,
        q_scale=q_scale,
        q_bias=q_bias,
        k_weight=k_weight,
        k_scale=k_scale,
        k_bias=k_bias,
        v_weight=v_weight,
        v_scale=v_scale,
        v_bias=v_bias,
        o_weight=o_weight,
        o_scale=o_scale,
        o_bias=o_bias,
        gate_weight=gate_weight,
        gate_scale=gate_scale,
        gate_bias=gate_bias,
        up_weight=up_weight,
        up_scale=up_scale,
        up_bias=up_bias,
        down_weight=down_weight,
        down_scale=down_scale,
        down_bias=down_bias,
        head_dim=head_dim,
        eps=eps,
        norm_offset=norm_offset,
        interleaved=interleaved,
        sm_scale=head_dim**-0.5 if sm_scale is None and head_dim > 0 else sm_scale,
        window=-1 if window is None else window,
        softcap=0.0 if softcap is None else softcap,
        activation=activation,
        scheme=resolve_schemes(scheme, hidden),
    )


def _check(
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    past: int,
    mask: Tensor | None,
    head_dim: int,
    eps: float,
    norm_offset: float,
    sm_scale: float,
    window: int,
    softcap: float,
    activation: str,
    scheme: str,
    **tensors: Any,
) -> None:
    op = "decoder_layer_"
    check_hidden(op, hidden)
    check_choice(op, "activation", activation, GATES)
    check_schemes(op, scheme, _LINEARS)
    check_non_negative(op, "eps", eps)
    if window != -1 and window < 1:
        raise ValueError(f"{op}: window is {window}, expected an int >= 1 or None")
    if past < 0:
        raise ValueError(f"{op}: past is {past}, expected a number of tokens, 0 or more")
    q_heads, kv_heads = _heads(head_dim, tensors["q_weight"], tensors["k_weight"])
    check_numbers(op, sm_scale, softcap)
    check_finite(op, "norm_offset", norm_offset)
    _check_angles(op, hidden, cos, sin, head_dim)
    _check_parameters(op, hidden, head_dim, q_heads, kv_heads, tensors)
    _check_cache(op, hidden, past, (hidden.shape[0], kv_heads, head_dim), tensors)
    check_layer_mask(op, mask, hidden, (hidden.shape[0], q_heads, hidden.shape[1], past + hidden.shape[1]))


def _heads(head_dim: int, q_weight: Tensor, k_weight: Tensor) -> tuple[int, int]:
    """The numbers of query and key heads."""
    op = "decoder_layer_"
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"{op}: head_dim is {head_dim}, expected an even number from 2 up")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_matrix(op, name, weight)
        if weight.shape[0] == 0 or weight.shape[0] % head_dim:
            raise ValueError(f"{op}: {name} has shape {shape_text(weight.shape)}, expected [heads * {head_dim}, H]")
    q_heads, kv_heads = q_weight.shape[0] // head_dim, k_weight.shape[0] // head_dim
    if q_heads % kv_heads:
        raise ValueError(f"{op}: q_weight makes {q_heads} heads, expected a multiple of k_weight's {kv_heads}")
    return q_heads, kv_heads


def _check_angles(op: str, hidden: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> None:
    check_floating(op, cos=cos, sin=sin)
    check_same_dtype(op, "cos", cos, sin=sin)
    check_same_device(op, "hidden", hidden, cos=cos, sin=sin)
    batch, length, _ = hidden.shape
    if cos.dim() != 3 or not broadcasts(cos.shape[0], batch) or cos.shape[1] != length:
        raise ValueError(f"{op}: cos has shape {shape_text(cos.shape)}, expected [{batch} or 1, {length}, W]")
    check_shape(op, "sin", sin, cos.shape, "the shape of cos")
    if cos.shape[2] % 2 or not 0 < cos.shape[2] <= head_dim:
        raise ValueError(f"{op}: cos has width {cos.shape[2]}, expected an even number from 2 to {head_dim}")


def _check_parameters(
    op: str, hidden: Tensor, head_dim: int, q_heads: int, kv_heads: int, tensors: dict[str, Any]
) -> None:
    check_matrix(op, "gate_weight", tensors["gate_weight"])
    size, inner = hidden.shape[-1], tensors["gate_weight"].shape[0]
    sizes = {
        "q": (q_heads * head_dim, size),
        "k": (kv_heads * head_dim, size),
        "v": (kv_heads * head_dim, size),
        "o": (size, q_heads * head_dim),
        "gate": (inner, size),
        "up": (inner, size),
        "down": (size, inner),
    }
    for name in _LINEARS:
        parts = (tensors[f"{name}_{part}"] for part in ("weight", "scale", "bias"))
        check_linear(op, name, hidden, sizes[name], *parts)
    check_floating(op, input_norm=tensors["input_norm"], post_norm=tensors["post_norm"])
    check_floating(op, **given(q_norm=tensors["q_norm"], k_norm=tensors["k_norm"]))
    for name, width in (("input_norm", size), ("post_norm", size), ("q_norm", head_dim), ("k_norm", head_dim)):
        check_shape(op, name, tensors[name], (width,))
        check_same_device(op, "hidden", hidden, **{name: tensors[name]})


def _check_cache(op: str, hidden: Tensor, past: int, sizes: tuple[int, int, int], tensors: dict[str, Any]) -> None:
    k_cache, v_cache = tensors["k_cache"], tensors["v_cache"]
    k_scale, v_scale = tensors["k_cache_scale"], tensors["v_cache_scale"]
    if (k_cache is None) != (v_cache is None) or (k_scale is None) != (v_scale is None):
        raise ValueError(f"{op}: one of k_cache and v_cache, or of their scales, was given without the other")
    if k_cache is None:
        if past or k_scale is not None:
            raise ValueError(f"{op}: past is {past}, expected 0 and no scales where there is no cache")
        return
    batch, heads, head_dim = sizes
    dtype = hidden.dtype if k_scale is None else torch.int8
    for name, cache, scale in (("k_cache", k_cache, k_scale), ("v_cache", v_cache, v_scale)):
        check_dtype(op, name, cache, dtype)
        capacity = cache.shape[2] if cache.dim() == 4 else past + hidden.shape[1]
        check_shape(op, name, cache, (batch, heads, capacity, head_dim), "batch, k_weight's heads, capacity, head_dim")
        check_same_device(op, "hidden", hidden, **{name: cache, f"{name}_scale": scale})
        if capacity < past + hidden.shape[1]:
            raise ValueError(
                f"{op}: {name} has room for {capacity} tokens, expected at least {past + hidden.shape[1]} "
                "(past and hidden's length)"
            )
        if scale is not None:
            check_dtype(op, f"{name}_scale", scale, torch.float32)
            check_shape(op, f"{name}_scale", scale, (batch, heads, capacity), f"that of {name} without head_dim")


def _fake(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden.new_empty(hidden.shape)


# window -1 and softcap 0 are none; scheme is "w8a8" or "w8a16", or one of them for each linear layer, with commas.
_LINEAR_ARGUMENTS = ", ".join(f"Tensor {n}_weight, Tensor? {n}_scale, Tensor? {n}_bias" for n in _LINEARS)
define(
    "decoder_layer_(Tensor hidden, Tensor cos, Tensor sin, Tensor(a!)? k_cache, Tensor(b!)? v_cache,"
    " Tensor(c!)? k_cache_scale, Tensor(d!)? v_cache_scale, int past, Tensor? mask, Tensor input_norm,"
    f" Tensor post_norm, Tensor? q_norm, Tensor? k_norm, {_LINEAR_ARGUMENTS}, int head_dim, float eps,"
    " float norm_offset, bool interleaved, float sm_scale, int window, float softcap, str activation, str scheme)"
    " -> Tensor",
    fake=_fake,
)
