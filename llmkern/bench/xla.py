"""XLA's operators as a JAX program would write each op: the baseline on a TPU as PyTorch is elsewhere.

Each function takes the op's schema by keyword with arrays for tensors, and is jitted as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp

from llmkern.bench.peer import Unsupported
from llmkern.jax._compute import activate, codes

__all__ = ["BASELINES"]


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)


def _norm(*, layer: bool, quant: bool, **call: Any) -> tuple[Array, ...]:
    x = _wide(call["x"])
    added: tuple[Array, ...] = ()
    if "residual" in call:
        added = ((x + _wide(call["residual"])).astype(call["x"].dtype),)
        x = _wide(added[0])
    if layer:
        x = x - x.mean(-1, keepdims=True)
    y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + call["eps"])
    if call["weight"] is not None:
        y = y * (_wide(call["weight"]) + call.get("weight_offset", 0.0))
    if call["bias"] is not None:
        y = y + _wide(call["bias"])
    return (*(codes(y) if quant else (y.astype(call["x"].dtype),)), *added)


def _gelu(x: Array, approximate: str) -> Array:
    return jax.nn.gelu(_wide(x), approximate=approximate == "tanh").astype(x.dtype)


def _swiglu(gate: Array, up: Array, *, quant: bool) -> Any:
    y = jax.nn.silu(_wide(gate)) * _wide(up)
    return codes(y) if quant else y.astype(gate.dtype)


def _quantize_int8(x: Array) -> Any:
    return codes(_wide(x))


def _rope(q: Array, k: Array, cos: Array, sin: Array, rotary_dim: int, interleaved: bool) -> tuple[Array, Array]:
    if interleaved or rotary_dim != cos.shape[-1]:
        raise Unsupported("halves with an angle for each dimension only")

    def one(x: Array) -> Array:
        turning, rest = _wide(x[..., :rotary_dim]), x[..., rotary_dim:]
        a, b = jnp.split(turning, 2, -1)
        turned = turning * _wide(cos)[:, None] + jnp.concatenate((-b, a), -1) * _wide(sin)[:, None]
        return jnp.concatenate((turned.astype(x.dtype), rest), -1)

    return one(q), one(k)


def _dot(a: Array, w: Array) -> Array:
    return jax.lax.dot_general(
        a,
        w,
        (((a.ndim - 1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.int32 if a.dtype == jnp.int8 else jnp.float32,
    )


def _linear(x: Array, weight: Array, bias: Array | None, activation: str) -> Array:
    y = _dot(x, weight)
    return activate(y if bias is None else y + _wide(bias), activation).astype(x.dtype)


def _int8_matmul(
    a_q: Array,
    w_q: Array,
    a_scale: Array | None,
    w_scale: Array | None,
    bias: Array | None,
    residual: Array | None,
    activation: str,
    out_dtype: Any,
) -> Array:
    found = _dot(a_q, w_q)
    wanted = str(out_dtype).removeprefix("torch.")
    if wanted == "int32":
        return found
    y = _wide(found)
    for scale in (a_scale, None if w_scale is None else w_scale.reshape(-1)):
        y = y if scale is None else y * scale
    y = activate(y if bias is None else y + _wide(bias), activation)
    return (y if residual is None else y + _wide(residual)).astype(wanted)


def _int8_linear(x: Array, w_q: Array, w_scale: Array, bias: Array | None, activation: str, scheme: str) -> Array:
    if scheme == "w8a8":
        q, scale = codes(_wide(x))
        return _int8_matmul(q, w_q, scale, w_scale, bias, None, activation, x.dtype)
    y = _dot(x, w_q.astype(x.dtype)) * w_scale.reshape(-1)
    return activate(y if bias is None else y + _wide(bias), activation).astype(x.dtype)


def _attend(q: Array, k: Array, v: Array, call: dict[str, Any], mask: Array | None, causal: bool) -> Array:
    for name in ("attn_mask", "key_padding_mask", "sinks", "block_table", "k_scale", "v_scale"):
        if call.get(name) is not None:
            raise Unsupported(f"without {name} only")
    if call["softcap"] or call["return_lse"] or any([size >= 0 for size in call["window"]]):
        raise Unsupported("without a softcap, a window and the log-sum-exp only")
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, scale=call["sm_scale"])
    return jnp.swapaxes(out, 1, 2)


def _attention(q: Array, k: Array, v: Array, causal: bool, **call: Any) -> Array:
    if causal and q.shape[2] != k.shape[2]:
        raise Unsupported("causal with as many queries as keys only")
    return _attend(q, k, v, call, None, causal)


def _attention_decode(q: Array, k_cache: Array, v_cache: Array, seq_lens: Array, **call: Any) -> Array:
    queries, slots = q.shape[2], k_cache.shape[2]
    position = seq_lens[:, None] - queries + jnp.arange(queries)
    seen = jnp.arange(slots) <= position[:, :, None]
    return _attend(q, k_cache, v_cache, call, seen[:, None], causal=False)


BASELINES: dict[str, Callable[..., Any]] = {
    **{
        f"{add}{kind}{quant}": partial(_norm, layer=kind == "layer_norm", quant=bool(quant))
        for add in ("", "add_")
        for kind in ("rms_norm", "layer_norm")
        for quant in ("", "_quant")
    },
    "gelu": _gelu,
    "swiglu": partial(_swiglu, quant=False),
    "swiglu_quant": partial(_swiglu, quant=True),
    "quantize_int8": _quantize_int8,
    "rope": _rope,
    "linear": _linear,
    "int8_matmul": _int8_matmul,
    "int8_linear": _int8_linear,
    "attention": _attention,
    "attention_decode": _attention_decode,
}
"""By op.  XLA has no operator over packed weights."""
