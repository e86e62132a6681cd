"""Calls, as shapes, that make each function of `llmkern.jax` choose each of its blocks: whole ones and cut ones."""

from __future__ import annotations

from typing import Any

from llmkern import packed
from llmkern.testing.case import Call

__all__ = ["calls"]

HALF, SINGLE, CODES = "bfloat16", "float32", "int8"


def calls(op: str) -> list[Call]:
    """The calls of `op`; arrays are `jax.ShapeDtypeStruct`s.  The first has blocks of the table's size."""
    return _CALLS[op]()


def _array(*shape: int, dtype: str = HALF) -> Any:
    import jax

    return jax.ShapeDtypeStruct(shape, dtype)


def _norms(*, residual: bool = False) -> list[Call]:
    found = []
    for rows, hidden, dtype in ((4096, 4096, HALF), (3, 577, SINGLE), (130, 300, HALF)):
        x, parameter = _array(rows, hidden, dtype=dtype), _array(hidden, dtype=dtype)
        found.append({"x": x, "weight": parameter, "bias": parameter} | ({"residual": x} if residual else {}))
    return found


def _rows(*names: str) -> list[Call]:
    shapes = ((4096, 4096, HALF), (7, 9000, SINGLE), (130, 300, HALF))
    return [{name: _array(rows, hidden, dtype=dtype) for name in names} for rows, hidden, dtype in shapes]


def _rope() -> list[Call]:
    def call(length: int, dim: int, width: int, dtype: str, **more: Any) -> Call:
        q, k = _array(2, 32, length, dim, dtype=dtype), _array(2, 8, length, dim, dtype=dtype)
        angles = _array(1, length, width, dtype=SINGLE)
        return {"q": q, "k": k, "cos": angles, "sin": angles, **more}

    return [
        call(512, 128, 128, HALF),
        call(1, 64, 32, SINGLE, rotary_dim=64),
        call(100, 80, 20, HALF, interleaved=True),
    ]


def _matmul() -> list[Call]:
    def call(m: int, n: int, k: int) -> Call:
        return {"a_q": _array(m, k, dtype=CODES), "w_q": _array(n, k, dtype=CODES)}

    def fused(m: int, n: int, k: int, dtype: str, activation: str) -> Call:
        scales = {"a_scale": _array(m, 1, dtype=SINGLE), "w_scale": _array(n, dtype=SINGLE)}
        more = {"bias": _array(n, dtype=dtype), "residual": _array(m, n, dtype=dtype)}
        return call(m, n, k) | scales | more | {"activation": activation, "out_dtype": dtype}

    return [
        fused(1024, 4096, 4096, HALF, "gelu"),
        fused(1, 577, 4100, SINGLE, "silu"),
        fused(300, 200, 100, HALF, "gelu_tanh"),
        call(1024, 4096, 4096) | {"out_dtype": "int32"},
    ]


def _linear() -> list[Call]:
    def call(m: int, n: int, k: int, dtype: str, activation: str) -> Call:
        x, weight, bias = (_array(*shape, dtype=dtype) for shape in ((m, k), (n, k), (n,)))
        return {"x": x, "weight": weight, "bias": bias, "activation": activation}

    return [
        call(1024, 4096, 4096, HALF, "silu"),
        call(1024, 4096, 4096, SINGLE, "none"),
        call(1, 577, 4100, HALF, "none"),
        call(3, 577, 4100, SINGLE, "gelu"),
    ]


def _int8_linear() -> list[Call]:
    return [
        {
            "x": _array(m, k, dtype=dtype),
            "w_q": _array(n, k, dtype=CODES),
            "w_scale": _array(n, dtype=SINGLE),
            "activation": activation,
            "scheme": scheme,
        }
        for m, n, k, dtype, activation, scheme in (
            (1024, 4096, 4096, HALF, "relu", "w8a16"),
            (1024, 4096, 4096, SINGLE, "none", "w8a16"),
            (4, 577, 4100, HALF, "silu", "w8a8"),
            (3, 577, 4100, SINGLE, "none", "w8a16"),
        )
    ]


def _quantized_linear() -> list[Call]:
    def groups(n: int, k: int, group: int, dtype: str = "float16") -> Any:
        return _array(-(-n // packed.PANEL), k // group, packed.PANEL, dtype=dtype)

    def call(m: int, n: int, k: int, dtype: str, code: str, group: int = 32) -> Call:
        size = packed.CODES[code].block_bytes
        codes = _array(-(-n // packed.PANEL), k // packed.BLOCK, size, dtype="uint8")
        x, scale = _array(m, k, dtype=dtype), groups(n, k, group)
        return {"x": x, "codes": codes, "scale": scale, "code": code, "n": n, "scheme": "a16"}

    return [
        call(1024, 4096, 4096, HALF, "s4", 128) | {"bias": _array(4096), "activation": "silu"},
        call(1024, 4096, 4096, SINGLE, "u4") | {"offset": groups(4096, 4096, 32)},
        call(3, 577, 5120, HALF, "s8") | {"residual": _array(3, 577)},
        call(7, 40, 96, SINGLE, "u4") | {"zero": groups(40, 96, 32, "uint8")},
    ]


def _attention() -> list[Call]:
    def call(queries: int, keys: int, dim: int, dtype: str, **more: Any) -> Call:
        q, k = _array(2, 8, queries, dim, dtype=dtype), _array(2, 2, keys, dim, dtype=dtype)
        return {"q": q, "k": k, "v": k, **more}

    everything = {
        "key_padding_mask": _array(2, 1000, dtype="bool"),
        "sinks": _array(8, dtype=SINGLE),
        "window": (100, 0),
        "softcap": 30.0,
        "return_lse": True,
        "causal": True,
    }
    return [
        call(2048, 2048, 128, HALF, causal=True),
        call(2048, 2048, 256, SINGLE, causal=True),
        call(1000, 1000, 64, SINGLE, attn_mask=_array(1, 1, 1000, 1000, dtype="bool"), **everything),
        call(1000, 1000, 96, HALF, attn_mask=_array(1, 8, 1000, 1000), **everything),
        call(9, 11, 40, HALF, attn_mask=_array(2, 1, 1, 11, dtype="bool")),
    ]


def _decode() -> list[Call]:
    def call(slots: int, queries: int, dim: int, dtype: str, cache: str, block: int | None, **more: Any) -> Call:
        batch, heads, kv_heads = 8, 32, 8
        shape = (batch, kv_heads, slots) if block is None else (batch * slots // block, kv_heads, block)
        found = {
            "q": _array(batch, heads, queries, dim, dtype=dtype),
            "k_cache": _array(*shape, dim, dtype=cache),
            "v_cache": _array(*shape, dim, dtype=cache),
            "seq_lens": _array(batch, dtype="int32"),
            **more,
        }
        if block is not None:
            found["block_table"] = _array(batch, slots // block, dtype="int32")
        if cache == CODES:
            found |= {name: _array(*shape, dtype=SINGLE) for name in ("k_scale", "v_scale")}
        return found

    more = {"sinks": _array(32, dtype=SINGLE), "window": (1000, 0), "softcap": 30.0, "return_lse": True}
    return [
        call(4096, 1, 128, HALF, HALF, None),
        call(4096, 16, 256, SINGLE, SINGLE, None, **more),
        call(1000, 1, 64, HALF, CODES, None, **more),
        call(4096, 4, 128, HALF, HALF, 16),
        call(4096, 1, 128, SINGLE, CODES, 16, **more),
        call(4096, 1, 128, HALF, HALF, 256),
    ]


_CALLS = {
    **{f"{norm}{quant}": _norms for norm in ("rms_norm", "layer_norm") for quant in ("", "_quant")},
    **{
        f"add_{norm}{quant}": lambda: _norms(residual=True)
        for norm in ("rms_norm", "layer_norm")
        for quant in ("", "_quant")
    },
    "quantize_int8": lambda: _rows("x"),
    "gelu": lambda: _rows("x"),
    "swiglu": lambda: _rows("gate", "up"),
    "swiglu_quant": lambda: _rows("gate", "up"),
    "rope": _rope,
    "int8_matmul": _matmul,
    "int8_linear": _int8_linear,
    "linear": _linear,
    "quantized_linear": _quantized_linear,
    "attention": _attention,
    "attention_decode": _decode,
}
