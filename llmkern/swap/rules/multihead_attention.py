"""torch.nn.MultiheadAttention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkern import ops
from llmkern.swap.derive import is_own, untouched
from llmkern.swap.guard import UNSEEN, guarded, stated
from llmkern.swap.match import Match, attention_sample

SWITCHES = ("attention",)


def find(module: nn.Module) -> Match | None:
    if not isinstance(module, nn.MultiheadAttention):
        return None
    if type(module).forward is not nn.MultiheadAttention.forward or not is_own(nn.MultiheadAttention, "forward"):
        return Match("attention", "", "it overrides the forward of torch.nn.MultiheadAttention")
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return Match("attention", "", "it has kdim, vdim, add_bias_kv or add_zero_attn")
    parts = stated(module, "_qkv_same_embed_dim", "bias_k", "bias_v", "add_zero_attn")
    if parts is None:
        return Match("attention", "", UNSEEN)
    cls = guarded(type(module), _forward, op="attention", parts=parts)
    return Match("attention", "attention", cls=cls, sample=partial(_sample, module))


def _sample(module: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return attention_sample(module.num_heads, module.num_heads, module.head_dim, dtype, device)


def _forward(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    reason = _beyond_the_op(self, query, need_weights)
    if is_causal and attn_mask is None:
        reason = "is_causal is a hint about attn_mask, and there is none"
    if reason is not None:
        options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return untouched(self, "attention", reason, (query, key, value, *options), {})
    if not self.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    q, k, v = _project(self, query, key, value)
    causal = is_causal and q.shape[2] == k.shape[2]  # a hint that attn_mask is the causal one
    padding, mask = _masks(q, key_padding_mask, None if causal else attn_mask)
    out = ops.attention(q, k, v, attn_mask=mask, key_padding_mask=padding, causal=causal)
    out = self.out_proj(out.transpose(1, 2).flatten(2))
    return (out if self.batch_first else out.transpose(0, 1)), None


def _beyond_the_op(module: Any, query: Tensor, need_weights: bool) -> str | None:
    if need_weights:
        return "the attention weights are asked for (need_weights), and a fused kernel has none"
    if module.training and module.dropout > 0.0:
        return f"attention dropout is {module.dropout} in training"
    if query.is_nested or query.dim() != 3:
        return "the input is nested or not batched"
    return None


def _project(module: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, E] each → q, k, v [B, H, S, D]; one matrix product where all three are the same tensor."""
    weight, bias = module.in_proj_weight, module.in_proj_bias
    if query is key and key is value:
        projected = F.linear(query, weight, bias).chunk(3, dim=-1)
    else:
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        projected = tuple(map(F.linear, (query, key, value), weight.chunk(3), biases))
    q, k, v = (x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in projected)
    return q, k, v


def _masks(q: Tensor, padding: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """torch.nn's masks, where True means "leave out" and floats are added, as ops.attention takes them."""
    if mask is not None:
        if mask.dim() == 3:
            mask = mask.unflatten(0, (q.shape[0], q.shape[1]))
        mask = ~mask if mask.dtype == torch.bool else mask.to(q.dtype)
    if padding is None or padding.dtype == torch.bool:
        return (None if padding is None else ~padding), mask
    added = padding[:, None, None, :].to(q.dtype)
    if mask is not None and mask.dtype == torch.bool:
        return None, added.masked_fill(~mask, float("-inf"))
    return None, added if mask is None else added + mask
