from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.reference.attention import merged_mask
from llmkern.backends.torch import TORCH
from llmkern.dispatch import implements
from llmkern.ops.attention import in_token_order, lse_like

# PyTorch's CPU kernel gives a NaN query 0 instead of NaN where there is no mask and there are fewer keys than a
# vector register has lanes (torch 2.13; 16 lanes with AVX-512).
LANES = 16


def refuse_lse(return_lse: bool, **_: Any) -> str | None:
    """The refusal that every call through scaled_dot_product_attention shares."""
    if return_lse:
        return "scaled_dot_product_attention does not return the log-sum-exp"
    return None


@implements("attention", TORCH, has_backward=True, refuse=refuse_lse)
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
    left, right = window
    unseen = k.shape[2] - q.shape[2] - left if left >= 0 else 0
    if unseen > 0:  # keys left of every query's window: at decoding, all but the window
        k, v = k[:, :, unseen:], v[:, :, unseen:]
        attn_mask = attn_mask[..., unseen:] if attn_mask is not None and attn_mask.shape[3] > 1 else attn_mask
        key_padding_mask = key_padding_mask[:, unseen:] if key_padding_mask is not None else None

    plain = softcap == 0 and sinks is None
    queries, keys = q.shape[2], k.shape[2]
    tiny = q.is_cpu and keys < LANES
    # is_causal aligns to the upper left, which is the same thing for as many keys as queries only.
    top_left = plain and causal and queries == keys and not tiny and not 0 <= left < keys - 1
    if top_left and attn_mask is None and key_padding_mask is None:
        out = _sdpa(q, k, v, None, True, sm_scale)
    else:
        mask = merged_mask(q, k, attn_mask, key_padding_mask, causal, window)
        if mask is not None and mask.shape[3] != keys:
            mask = mask.expand(-1, -1, -1, keys)
        elif mask is None and tiny:
            mask = q.new_ones((1, 1, 1, keys), dtype=torch.bool)
        out = _sdpa(q, k, v, mask, False, sm_scale) if plain else _composed(q, k, v, mask, sinks, sm_scale, softcap)
    return in_token_order(out), lse_like(q, False)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, sm_scale: float) -> Tensor:
    """scaled_dot_product_attention, without copies of k and v for grouped heads wherever it has a fast path for that.

    On the CPU it reads grouped heads directly, masked or not; CUDA's fused kernels do so without a mask only.  One
    query is fastest with its group of heads in the place of queries.
    """
    shape = (*q.shape[:3], v.shape[3])
    on_cpu, grouped = q.is_cpu, q.shape[1] != k.shape[1]
    if mask is not None and mask.is_floating_point() and not on_cpu:
        mask = mask.to(q.dtype)  # the fused CUDA kernels take no other
    if grouped and q.shape[2] == 1:
        group = q.shape[1] // k.shape[1]
        q = q.reshape(q.shape[0], k.shape[1], group, q.shape[3])
        if mask is not None and mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], k.shape[1], group, mask.shape[3])
        grouped = False
    elif grouped and not on_cpu and not (mask is None and k.shape[3] == v.shape[3] <= 256):
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        grouped = False
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=sm_scale, enable_gqa=grouped
    ).reshape(shape)
    # The CPU kernels give rows that see nothing 0; other devices' have differed between versions.
    return out if on_cpu or mask is None else _zero_unseeing(out, mask)


def _composed(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, sm_scale: float, softcap: float
) -> Tensor:
    """Compute calls that scaled_dot_product_attention cannot express, by operators that each read the scores once."""
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    # A group's queries against their one key head: a plain batched matmul, and no repeated copies of k and v.
    rows = (batch, k.shape[1], heads // k.shape[1] * queries)
    scaled = q * (sm_scale / softcap if softcap > 0 else sm_scale)
    scores = (scaled.reshape(*rows, head_dim) @ k.transpose(2, 3)).reshape(batch, heads, queries, keys)
    if mask is not None:
        # Far below every score but finite: a row of −inf would give NaN, and its gradient too.
        lowest = torch.finfo(scores.dtype).min / 2
        if mask.dtype == torch.bool:
            bias = scores.new_zeros(mask.shape).masked_fill_(~mask, lowest)
        else:
            bias = mask.to(scores.dtype).clamp(min=lowest)
        # Autograd keeps tanh's result, so what follows it works out of place.
        scores = torch.add(bias, scores.tanh_(), alpha=softcap) if softcap > 0 else scores.add_(bias)
    elif softcap > 0:
        scores = scores.tanh_() * softcap
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(batch, heads, queries, 1)
        scores = torch.cat([scores, column], -1)
    weights = F.softmax(scores, -1)[..., :keys]  # sums in fp32 whatever the dtype, and rounds once
    out = (weights.reshape(*rows, keys) @ v).reshape(batch, heads, queries, v.shape[3])
    return out if mask is None or sinks is not None else _zero_unseeing(out, mask)


def _zero_unseeing(out: Tensor, mask: Tensor) -> Tensor:
    """`out` with 0 in the rows to which the mask shows no key."""
    hidden = ~mask if mask.dtype == torch.bool else mask == -math.inf
    return out.masked_fill(hidden.all(-1, keepdim=True), 0.0)
