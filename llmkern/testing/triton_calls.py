"""Calls, on the meta device, that make each Triton launcher choose each of its configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.testing.case import Call

__all__ = ["calls", "meta"]

HALF, SINGLE, CODES = torch.bfloat16, torch.float32, torch.int8


def meta(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(op: str, target: str) -> list[Call]:
    """The calls of `op` to compile for `target`."""
    if op.startswith("attention"):
        return _attention(op, target)
    return _CALLS[op]


def _norm(hidden: int, dtype: torch.dtype = HALF, **more: Any) -> Call:
    x, parameter = meta(4096, hidden, dtype=dtype), meta(hidden, dtype=dtype)
    return {"x": x, "weight": parameter, "bias": parameter, "eps": 1e-6, **more}


def _rope(interleaved: bool, dim: int = 128, rotary_dim: int = 128, dtype: torch.dtype = HALF) -> Call:
    angles = meta(1, 512, rotary_dim, dtype=SINGLE)
    q, k = meta(2, 32, 512, dim, dtype=dtype), meta(2, 8, 512, dim, dtype=dtype)
    return {"q": q, "k": k, "cos": angles, "sin": angles, "rotary_dim": rotary_dim, "interleaved": interleaved}


def _matmul(rows: int, k: int = 4096, out: torch.dtype = HALF, **more: Any) -> Call:
    call = {
        "a_q": meta(rows, k, dtype=CODES),
        "w_q": meta(4096, k, dtype=CODES),
        "a_scale": meta(rows, 1, dtype=SINGLE),
        "w_scale": meta(4096, 1, dtype=SINGLE),
        "bias": meta(4096),
        "residual": meta(rows, 4096),
        "activation": "gelu",
        "out_dtype": out,
    }
    return call | more


def _linear(rows: int, dtype: torch.dtype) -> Call:
    return {
        "x": meta(rows, 4096, dtype=dtype),
        "w_q": meta(4096, 4096, dtype=CODES),
        "w_scale": meta(4096, 1, dtype=SINGLE),
        "bias": meta(4096, dtype=dtype),
        "activation": "silu",
        "scheme": "w8a16",
    }


_OFFSET: Any = {"weight_offset": 0.0}
_BARE: Any = {name: None for name in ("a_scale", "w_scale", "bias", "residual")}
_X = meta(64, 4096)
_CALLS: dict[str, list[Call]] = {
    "rms_norm": [_norm(h, d, **_OFFSET) for h in (64, 16384) for d in (HALF, SINGLE)],
    "layer_norm": [_norm(h) for h in (64, 16384)],
    "add_rms_norm": [_norm(4096, residual=meta(4096, 4096), **_OFFSET)],
    "add_layer_norm": [_norm(16384, residual=meta(4096, 16384))],
    "rms_norm_quant": [_norm(h, **_OFFSET) for h in (64, 16384)],
    "add_rms_norm_quant": [_norm(16384, residual=meta(4096, 16384), **_OFFSET)],
    "layer_norm_quant": [_norm(h) for h in (64, 16384)],
    "add_layer_norm_quant": [_norm(16384, residual=meta(4096, 16384))],
    "rms_norm_backward": [_norm(h, dy=meta(4096, h), **_OFFSET) for h in (64, 8192)],
    "layer_norm_backward": [_norm(h, d, dy=meta(4096, h, dtype=d)) for h in (64, 8192) for d in (HALF, SINGLE)],
    "quantize_int8": [{"x": meta(64, h)} for h in (300, 4096, 16384)] + [{"x": meta(64, 16384, dtype=SINGLE)}],
    "swiglu": [{"gate": _X, "up": _X}, {"gate": meta(64, 8192)[:, :4096], "up": meta(64, 8192)[:, 4096:]}],
    "swiglu_quant": [{"gate": meta(64, h), "up": meta(64, h)} for h in (300, 4096, 16384)],
    "swiglu_backward": [{"dy": _X, "gate": _X, "up": _X}],
    "gelu": [{"x": _X, "approximate": name} for name in ("none", "tanh")],
    "gelu_backward": [{"dy": _X, "x": _X, "approximate": name} for name in ("none", "tanh")],
    "rope": [_rope(False), _rope(True), _rope(False, rotary_dim=32), _rope(False, dim=256, rotary_dim=256)],
    "int8_matmul": [
        *[_matmul(rows) for rows in (1, 64, 4096)],
        _matmul(4096, **_BARE, activation="none", out_dtype=torch.int32),
        _matmul(17, k=1001),  # rows that are not aligned: no copies of 16 bytes
    ],
    "int8_linear": [_linear(rows, dtype) for rows in (1, 64, 4096) for dtype in (HALF, SINGLE)],
}


def _attention(op: str, target: str) -> list[Call]:
    """Everything at once, which needs the most registers, for each class of head dimensions; causal alone for one.

    On gfx942 one class.
    """
    found = [(128, True, HALF)]
    if target != "gfx942":
        found = [(128, False, HALF), *[(dim, True, dtype) for dim in (64, 128, 256) for dtype in (HALF, SINGLE)]]
    builders = {"attention_backward": _backward, "attention_decode": _decode, "attention_varlen": _varlen}
    build = builders.get(op, _forward)
    return [build(dim, full, dtype) for dim, full, dtype in found]


def _forward(dim: int, full: bool, dtype: torch.dtype) -> Call:
    return {
        "q": meta(2, 16, 512, dim, dtype=dtype),
        "k": meta(2, 4, 512, dim, dtype=dtype),
        "v": meta(2, 4, 512, dim, dtype=dtype),
        "attn_mask": meta(2, 1, 512, 512, dtype=dtype) if full else None,
        "key_padding_mask": meta(2, 512, dtype=torch.bool) if full else None,
        "sinks": meta(16, dtype=dtype) if full else None,
        "causal": True,
        "sm_scale": 0.125,
        "window": [100, 0] if full else [-1, -1],
        "softcap": 30.0 if full else 0.0,
        "return_lse": True,
    }


def _backward(dim: int, full: bool, dtype: torch.dtype) -> Call:
    call = _forward(dim, full, dtype)
    del call["return_lse"]
    lse = meta(2, 16, 512, dtype=SINGLE)
    return call | {"dout": call["q"], "dlse": lse, "out": call["q"], "lse": lse, "mask_grad": full}


def _decode(dim: int, full: bool, dtype: torch.dtype) -> Call:
    kind = CODES if full else dtype
    return {
        "q": meta(8, 32, 1, dim, dtype=dtype),
        "k_cache": meta(512, 8, 16, dim, dtype=kind) if full else meta(8, 8, 4096, dim, dtype=kind),
        "v_cache": meta(512, 8, 16, dim, dtype=kind) if full else meta(8, 8, 4096, dim, dtype=kind),
        "seq_lens": meta(8, dtype=torch.int32),
        "block_table": meta(8, 64, dtype=torch.int32) if full else None,
        "k_scale": meta(512, 8, 16, dtype=SINGLE) if full else None,
        "v_scale": meta(512, 8, 16, dtype=SINGLE) if full else None,
        "sinks": meta(32, dtype=dtype) if full else None,
        "sm_scale": 0.125,
        "window": [1000, 0] if full else [-1, -1],
        "softcap": 30.0 if full else 0.0,
        "return_lse": True,
    }


def _varlen(dim: int, full: bool, dtype: torch.dtype) -> Call:
    pages = meta(512, 16, 8, dim, dtype=dtype)
    lengths = meta(9, dtype=torch.int32)
    return {
        "q": meta(2048, 32, dim, dtype=dtype),
        "k": pages if full else meta(2048, 8, dim, dtype=dtype),
        "v": pages if full else meta(2048, 8, dim, dtype=dtype),
        "cu_seqlens_q": lengths,
        "cu_seqlens_k": None if full else lengths,
        "seqused_k": meta(8, dtype=torch.int32) if full else None,
        "block_table": meta(8, 64, dtype=torch.int32) if full else None,
        "sinks": meta(32, dtype=dtype) if full else None,
        "causal": True,
        "sm_scale": 0.125,
        "window": [100, 0] if full else [-1, -1],
        "softcap": 30.0 if full else 0.0,
        "return_lse": True,
    }
