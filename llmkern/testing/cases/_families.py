"""Layers of families that have what neither Llama nor BERT has, as programs; tests/swap/families.md has them all."""

from __future__ import annotations

__all__ = ["FAMILIES"]

_PARALLEL = """layer(hidden, cos, sin, mask)
  x = layer_norm(hidden, first_norm, eps=1e-05)
  q, k, v = linear(x, qkv[0:8/24], qkv[8:16/24], qkv[16:24/24])
  q, k = rope(q, k, cos, sin, dim=8, rotary=4)
  k, v = append(k, v)
  a = attention(q, k, v, mask, dim=8, scale=0.35, causal)
  y = layer_norm(hidden, second_norm, eps=1e-05)
  g = linear(y, up, activation=gelu)
  h = linear(a, o, residual=hidden)
  hidden = linear(g, down, residual=h)
  return hidden"""

_SANDWICH = """layer(hidden, cos, sin, mask)
  x = rms_norm(hidden, norm, eps=1e-06, offset=1.0)
  q, k, v = linear(x, q_proj, k_proj, v_proj)
  q, k = rope(q, k, cos, sin, dim=16)
  k, v = append(k, v)
  a = attention(q, k, v, mask, dim=16, scale=0.0625, causal, window=4, softcap=50.0)
  u = linear(a, o_proj)
  y = rms_norm(u, post_norm, eps=1e-06, offset=1.0)
  z, h = add_rms_norm(y, hidden, pre_norm, eps=1e-06, offset=1.0)
  g = linear(z, gate, up, activation=geglu_tanh)
  u = linear(g, down)
  w = rms_norm(u, last_norm, eps=1e-06, offset=1.0)
  hidden = add(h, w)
  return hidden"""

_HEAD_NORMS = """layer(hidden, cos, sin, mask)
  x = layer_norm(hidden, norm, eps=1e-05)
  q, k, v = linear(x, qkv[0:8/24], qkv[8:16/24], qkv[16:24/24])
  q = layer_norm(q, q_norm, eps=1e-05, dim=8)
  k = layer_norm(k, k_norm, eps=1e-05, dim=8)
  q, k = rope(q, k, cos, sin, dim=8, rotary=4)
  k, v = append(k, v)
  a = attention(q, k, v, mask, dim=8, scale=0.35, causal)
  h = linear(a, o, residual=hidden)
  y = layer_norm(h, second_norm, eps=1e-05)
  g = linear(y, up, activation=relu2)
  hidden = linear(g, down, residual=h)
  return hidden"""

_CLAMPED = """layer(hidden, cos, sin, mask)
  x = layer_norm(hidden, norm, eps=1e-05)
  q, k, v = linear(x, q_proj, k_proj, v_proj)
  q = clamp(q, low=-0.5, high=0.5)
  k = clamp(k, low=-0.5)
  v = clamp(v, high=0.5)
  q, k = rope(q, k, cos, sin, dim=8)
  k, v = append(k, v)
  a = attention(q, k, v, mask, dim=8, scale=0.35, causal)
  h = linear(a, o, residual=hidden)
  y = layer_norm(h, second_norm, eps=1e-05)
  g = linear(y, gate, up, activation=swiglu)
  hidden = linear(g, down, residual=h)
  return hidden"""

_SCALED = """layer(hidden, cos, sin, mask)
  x = rms_norm(hidden, norm, eps=1e-06)
  q, k, v = linear(x, q_proj, k_proj, v_proj)
  q, k = rope(q, k, cos, sin, dim=8)
  k, v = append(k, v)
  a = attention(q, k, v, mask, dim=8, scale=0.2, causal)
  h = linear(a, o, multiplier=0.22, residual=hidden)
  y = rms_norm(h, second_norm, eps=1e-06)
  g = linear(y, gate, up, activation=swiglu)
  u = linear(g, down)
  u = scale(u, by=0.22)
  hidden = add(h, u)
  return hidden"""

_LAYER_SCALE = """layer(hidden, mask)
  x = layer_norm(hidden, norm1, eps=1e-06)
  q, k, v = linear(x, q_proj, k_proj, v_proj)
  a = attention(q, k, v, mask, dim=8, scale=0.35)
  u = linear(a, o)
  t = scale(u, by=@scale1)
  y, h = add_layer_norm(t, hidden, norm2, eps=1e-06)
  g = linear(y, fc1, activation=quick_gelu)
  u = linear(g, fc2)
  t = scale(u, by=@scale2)
  hidden = add(t, h)
  return hidden"""

_ALIBI = """layer(hidden, mask, alibi)
  x = layer_norm(hidden, norm, eps=1e-05)
  q, k, v = linear(x, qkv[0:8/24], qkv[8:16/24], qkv[16:24/24])
  k, v = append(k, v)
  a = attention(q, k, v, mask, dim=8, scale=0.35, causal, bias=alibi)
  h = linear(a, o, residual=hidden)
  y = layer_norm(h, second_norm, eps=1e-05)
  g = linear(y, up, activation=gelu_tanh)
  hidden = linear(g, down, residual=h)
  return hidden"""

_SLOPES = """layer(hidden, mask)
  x = layer_norm(hidden, norm, eps=1e-05)
  q, k, v = linear(x, q_proj, k_proj, v_proj)
  k, v = append(k, v)
  a = attention(q, k, v, mask, dim=8, scale=0.35, causal, sinks=@sinks, slopes=@slopes)
  h = linear(a, o, residual=hidden)
  hidden = linear(h, down, activation=relu2, multiplier=0.5, residual=h)
  return hidden"""

_CROSS = """layer(hidden, mask, encoder, encoder_mask)
  q, k, v = linear(hidden, q_proj, k_proj, v_proj)
  k, v = append(k, v)
  a = attention(q, k, v, mask, dim=8, scale=0.35, causal)
  h = linear(a, o, residual=hidden)
  x = layer_norm(h, norm, eps=1e-05)
  q = linear(x, cross_q)
  k, v = linear(encoder, cross_k, cross_v)
  k, v = keep(k, v)
  a = attention(q, k, v, encoder_mask, dim=8, scale=0.35)
  h = linear(a, cross_o, residual=x)
  y = layer_norm(h, second_norm, eps=1e-05)
  g = linear(y, fc1, activation=gelu)
  h = linear(g, fc2, residual=y)
  hidden = layer_norm(h, last_norm, eps=1e-05)
  return hidden"""

_BIASED = """layer(hidden, mask, bias, encoder, encoder_mask)
  x = rms_norm(hidden, norm, eps=1e-06)
  q, k, v = linear(x, q_proj, k_proj, v_proj)
  k, v = append(k, v)
  a = attention(q, k, v, mask, dim=8, scale=1.0, causal, bias=bias)
  h = linear(a, o, residual=hidden)
  y = rms_norm(h, second_norm, eps=1e-06)
  q = linear(y, cross_q)
  k, v = linear(encoder, cross_k, cross_v)
  k, v = keep(k, v)
  a = attention(q, k, v, encoder_mask, dim=8, scale=1.0)
  h = linear(a, cross_o, residual=h)
  z = rms_norm(h, last_norm, eps=1e-06)
  g = linear(z, gate, up, activation=geglu_tanh)
  hidden = linear(g, down, residual=h)
  return hidden"""

_APART = """layer(hidden, mask, encoder, encoder_mask)
  q = linear(hidden, in_proj[0:32])
  k, v = linear(encoder, in_proj[32:64], in_proj[64:96])
  a = attention(q, k, v, encoder_mask, dim=8, scale=0.35)
  u = linear(a, o, multiplier=0.5)
  h = add(u, hidden)
  g = linear(h, gate_up[0:8/16], gate_up[8:16/16], activation=swiglu)
  hidden = linear(g, down, residual=h)
  return hidden"""

_TURNED = """layer(hidden, mask)
  x = layer_norm(hidden, ln_1, eps=1e-05)
  q, k, v = linear(x, c_attn[0:32], c_attn[32:64], c_attn[64:96])
  k, v = append(k, v)
  a = attention(q, k, v, mask, dim=8, scale=0.35, causal)
  h = linear(a, c_proj, residual=hidden)
  y = layer_norm(h, ln_2, eps=1e-05)
  g = linear(y, c_fc, activation=gelu_tanh)
  hidden = linear(g, c_out, residual=h)
  return hidden"""

_EXPERTS = """layer(hidden, cos, sin, mask)
  x = rms_norm(hidden, norm, eps=1e-05)
  q, k, v = linear(x, q_proj, k_proj, v_proj)
  q, k = rope(q, k, cos, sin, dim=8)
  k, v = append(k, v)
  a = attention(q, k, v, mask, dim=8, scale=0.35, causal)
  h = linear(a, o, residual=hidden)
  y = rms_norm(h, second_norm, eps=1e-05)
  r = route(y, router, top=2, normalized)
  u = experts(y, r, gate_up[0:48], gate_up[48:96], down, activation=swiglu)
  hidden = add(h, u)
  return hidden"""

_LIMITED = """layer(hidden, mask)
  x = rms_norm(hidden, norm, eps=1e-05)
  q, k, v = linear(x, q_proj, k_proj, v_proj)
  k, v = append(k, v)
  a = attention(q, k, v, mask, dim=8, scale=0.35, causal, sinks=@sinks)
  h = linear(a, o, residual=hidden)
  r = route(h, router, top=3, sigmoid, scale=1.5)
  u = experts(h, r, gate_up[0:1/2], gate_up[1:2/2], down, activation=quick_geglu, limit=0.5, offset=1.0)
  hidden = add(u, h)
  return hidden"""

_GROUPED = """layer(hidden, mask)
  q, k, v = linear(hidden, q_proj, k_proj, v_proj)
  k, v = append(k, v)
  a = attention(q, k, v, mask, dim=8, scale=0.35, causal)
  h = linear(a, o, residual=hidden)
  y = rms_norm(h, norm, eps=1e-05)
  r = route(y, router, top=2, sigmoid, normalized, eps=1e-20, scale=2.5, wide, groups=2, group_top=1, correction=@added)
  u = experts(y, r, gate_up[0:48], gate_up[48:96], down, activation=swiglu)
  g = linear(y, shared_gate, shared_up, activation=swiglu)
  t = linear(g, shared_down, residual=u)
  hidden = add(h, t)
  return hidden"""

FAMILIES: dict[str, str] = {
    "gpt-neox": _PARALLEL,
    "gemma2": _SANDWICH,
    "persimmon": _HEAD_NORMS,
    "olmo": _CLAMPED,
    "granite": _SCALED,
    "dinov2": _LAYER_SCALE,
    "bloom": _ALIBI,
    "mpt": _SLOPES,
    "bart": _CROSS,
    "t5": _BIASED,
    "torch-decoder": _APART,
    "gpt2": _TURNED,
    "mixtral": _EXPERTS,
    "gpt-oss": _LIMITED,
    "glm4-moe": _GROUPED,
}
"""By the family that needs what the program has: rows of a period, clamps, factors, biases, kept keys, …"""
