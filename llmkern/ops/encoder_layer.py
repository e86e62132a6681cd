"""A whole encoder layer with its norms after the sums, as in BERT (Devlin et al. 2018, arXiv:1810.04805)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from llmkern.checks import check_choice, check_is_tensor, check_non_negative, check_parameter, shape_text
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

__all__ = ["encoder_layer"]

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu")
_LINEARS = ("q", "k", "v", "o", "up", "down")


def encoder_layer(
    hidden: Tensor,
    *,
    heads: int,
    attention_norm: Tensor,
    output_norm: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    o_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    mask: Tensor | None = None,
    attention_norm_bias: Tensor | None = None,
    output_norm_bias: Tensor | None = None,
    q_scale: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_scale: Tensor | None = None,
    v_bias: Tensor | None = None,
    o_scale: Tensor | None = None,
    o_bias: Tensor | None = None,
    up_scale: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_scale: Tensor | None = None,
    down_bias: Tensor | None = None,
    eps: float = 1e-12,
    sm_scale: float | None = None,
    activation: str = "gelu",
    scheme: str | Sequence[str] = "auto",
) -> Tensor:
    """`layer_norm(h + down(act(up(h))))` with `h = layer_norm(hidden + o(attention(q, k, v)))`; q, k and v are the
    projections of `hidden`, and every token sees every token that `mask` lets it.

    hidden: [B, S, H], fp32, bf16, fp16 or fp64.
    heads: of the attention; q_weight's rows are a multiple of it, and k_weight and v_weight have as many.
    <name>_weight: [out, in] in hidden's dtype, or int8 with <name>_scale, fp32 [out, 1], as for `int8_linear`;
        <name>_bias: [out].  Any strides: rows of a packed projection pass as they are.
    attention_norm, output_norm and their biases: [H], of the two layer_norms.  eps: of both.
    mask: 4 dimensions that broadcast to [B, heads, S, S]; bool (True: attend), or hidden's dtype or fp32 (added).
    sm_scale: default 1/sqrt(head dimension).  activation: "gelu", "gelu_tanh", "silu" or "relu".
    scheme: of the int8 weights, as for `int8_linear`; one for all, or one for each linear layer in the order of the
        arguments (q, k, v, o, up, down).
    Returns [B, S, H], contiguous, in hidden's dtype.  Sums and norms are in fp32 (fp64 for fp64); between the layer's
    parts values are rounded to hidden's dtype, or not at all.  A sequence's bits depend on the sequences beside it as a
    row's do in `linear` and `int8_linear`.
    No gradient.  Raises TypeError for other dtypes, ValueError for other shapes, devices or values.
    """
    if sm_scale is None:
        sm_scale = (q_weight.shape[0] / heads) ** -0.5 if heads > 0 and q_weight.numel() else 1.0
    return dispatch(
        "encoder_layer",
        _check,
        hidden=hidden,
        mask=mask,
        attention_norm=attention_norm,
        attention_norm_bias=attention_norm_bias,
        output_norm=output_norm,
        output_norm_bias=output_norm_bias,
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
        up_weight=up_weight,
        up_scale=up_scale,
        up_bias=up_bias,
        down_weight=down_weight,
        down_scale=down_scale,
        down_bias=down_bias,
        heads=heads,
        eps=eps,
        sm_scale=sm_scale,
        activation=activation,
        scheme=resolve_schemes(scheme, hidden),
    )


def _check(
    hidden: Tensor,
    mask: Tensor | None,
    heads: int,
    eps: float,
    sm_scale: float,
    activation: str,
    scheme: str,
    **tensors: Any,
) -> None:
    op = "encoder_layer"
    check_hidden(op, hidden)
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_schemes(op, scheme, _LINEARS)
    check_non_negative(op, "eps", eps)
    check_numbers(op, sm_scale, 0.0)
    q_weight = tensors["q_weight"]
    for name in ("q_weight", "up_weight"):
        check_matrix(op, name, tensors[name])
    for name in ("attention_norm", "output_norm"):
        check_is_tensor(op, name, tensors[name])
    if heads < 1 or q_weight.shape[0] == 0 or q_weight.shape[0] % heads:
        raise ValueError(f"{op}: q_weight has shape {shape_text(q_weight.shape)}, expected [{heads} heads * D, H]")
    size, across, inner = hidden.shape[-1], q_weight.shape[0], tensors["up_weight"].shape[0]
    into = dict.fromkeys("qkv", (across, size)) | {"o": (size, across), "up": (inner, size), "down": (size, inner)}
    for name in _LINEARS:
        parts = (tensors[f"{name}_{part}"] for part in ("weight", "scale", "bias"))
        check_linear(op, name, hidden, into[name], *parts)
    norms = ("attention_norm", "attention_norm_bias", "output_norm", "output_norm_bias")
    check_parameter(op, "hidden", hidden, **{name: tensors[name] for name in norms})
    batch, length, _ = hidden.shape
    check_layer_mask(op, mask, hidden, (batch, heads, length, length))


def _fake(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden.new_empty(hidden.shape)


# scheme is "w8a8" or "w8a16", or one of them for each linear layer, with commas.
_LINEAR_ARGUMENTS = ", ".join(f"Tensor {n}_weight, Tensor? {n}_scale, Tensor? {n}_bias" for n in _LINEARS)
define(
    "encoder_layer(Tensor hidden, Tensor? mask, Tensor attention_norm, Tensor? attention_norm_bias,"
    f" Tensor output_norm, Tensor? output_norm_bias, {_LINEAR_ARGUMENTS}, int heads, float eps, float sm_scale,"
    " str activation, str scheme) -> Tensor",
    fake=_fake,
)
