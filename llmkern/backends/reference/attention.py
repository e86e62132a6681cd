from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmkern.backends.reference import REFERENCE, accumulate
from llmkern.dispatch import implements
from llmkern.ops.attention import in_token_order, lse_like


def band(queries: int, keys: int, causal: bool, window: Sequence[int], device: torch.device) -> Tensor | None:
    """Return bool [queries, keys], what `causal` and `window` let each query see, or None if they hide nothing.

    Query i stands at key position i + keys − queries, so the last query stands at the last key.
    """
    left, right = window
    if causal:
        right = 0
    hides_left = 0 <= left < keys - 1
    hides_right = 0 <= right < queries - 1
    if not (hides_left or hides_right):
        return None
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if hides_left:
        visible = visible.triu(keys - queries - left)
    return visible.tril(keys - queries + right) if hides_right else visible


def merged_mask(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    causal: bool,
    window: Sequence[int],
) -> Tensor | None:
    """Merge everything that hides keys into one mask of 4 dimensions, bool or additive, or None."""
    visible = band(q.shape[2], k.shape[2], causal, window, q.device)
    if visible is not None:
        visible = visible[None, None]
    if key_padding_mask is not None:
        real = key_padding_mask[:, None, None, :]
        visible = real if visible is None else visible & real
    if attn_mask is None or visible is None:
        return attn_mask if visible is None else visible
    if attn_mask.dtype == torch.bool:
        return attn_mask & visible
    return torch.where(visible, attn_mask, -math.inf)


class _Softmax(NamedTuple):
    """weights [B, Hq, Sq, Skv] and sink_weight [B, Hq, Sq, 1] sum to 1, or to 0 in rows that see nothing.

    lse: [B, Hq, Sq].  slope: of the capped scores against the scores, None without a cap.
    """

    weights: Tensor
    sink_weight: Tensor
    lse: Tensor
    slope: Tensor | None


def _softmax(
    q: Tensor, k: Tensor, mask: Tensor | None, sinks: Tensor | None, sm_scale: float, softcap: float
) -> _Softmax:
    """The softmax of the scores; k has as many heads as q."""
    scores = q @ k.transpose(2, 3) * sm_scale
    slope = None
    if softcap > 0:
        tanh = torch.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1 - tanh.square()
    if mask is not None:
        scores = torch.where(mask, scores, -math.inf) if mask.dtype == torch.bool else scores + mask
    column = scores.new_full((*scores.shape[:3], 1), -math.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand_as(column)
    # A row that sees nothing has the maximum −inf and the sum 0: shift it by 0 and divide by 1 instead.
    top = torch.cat([scores, column], -1).amax(-1, keepdim=True).detach()
    shift = torch.where(top == -math.inf, 0, top)
    weights, sink_weight = torch.exp(scores - shift), torch.exp(column - shift)
    total = weights.sum(-1, keepdim=True) + sink_weight
    empty = total == 0
    total = torch.where(empty, 1, total)
    lse = torch.where(empty, -math.inf, shift + total.log()).squeeze(-1)
    return _Softmax(weights / total, sink_weight / total, lse, slope)


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round what is multiplied next: tensor cores multiply in the dtype of q, k and v, so every kernel may."""
    return x.to(dtype).to(x.dtype)


@implements("attention", REFERENCE, has_backward=True)
def attention(
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
    group = q.shape[1] // k.shape[1]
    kf, vf = (accumulate(x).repeat_interleave(group, 1) for x in (k, v))
    mask = merged_mask(q, k, attn_mask, key_padding_mask, causal, window)
    softmax = _softmax(accumulate(q), kf, mask, sinks, sm_scale, softcap)
    out = in_token_order((_operand(softmax.weights, q.dtype) @ vf).to(q.dtype))
    return out, softmax.lse if return_lse else lse_like(q, False)


@implements("attention_backward", REFERENCE, has_backward=True)
def attention_backward(
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
    """With P the weights, dP = dO·Vᵀ and Δ = rowsum(dO∘O) − dlse: dS = P∘(dP − Δ), dV = Pᵀ·dO, and for the sink,
    whose value is 0, dsink = −P_sink·Δ.  The cap's slope stands between dS and dQ = sm_scale·dS·K.

    P is computed again rather than as exp(S − lse): beside a mask of −3e38, lse has lost the logarithm of the sum.
    """
    group = q.shape[1] // k.shape[1]
    qf, dof = accumulate(q), accumulate(dout)
    kf, vf = (accumulate(x).repeat_interleave(group, 1) for x in (k, v))
    mask = merged_mask(q, k, attn_mask, key_padding_mask, causal, window)
    softmax = _softmax(qf, kf, mask, sinks, sm_scale, softcap)
    delta = (dof * accumulate(out)).sum(-1, keepdim=True)
    if dlse.numel():
        delta = delta - dlse.unsqueeze(-1)
    dscores = softmax.weights * (dof @ vf.transpose(2, 3) - delta)
    dmask, dsinks = q.new_empty(0), q.new_empty(0)
    if attn_mask is not None and mask_grad:
        dmask = dscores.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    if sinks is not None:
        dsinks = -(softmax.sink_weight * delta).sum((0, 2, 3)).to(sinks.dtype)
    if softmax.slope is not None:
        dscores = dscores * softmax.slope
    dscores = _operand(dscores * sm_scale, q.dtype)
    dq = (dscores @ kf).to(q.dtype)
    dk = (dscores.transpose(2, 3) @ qf).unflatten(1, (-1, group)).sum(2).to(k.dtype)
    dv = (_operand(softmax.weights, q.dtype).transpose(2, 3) @ dof).unflatten(1, (-1, group)).sum(2).to(v.dtype)
    return dq, dk, dv, dmask, dsinks
