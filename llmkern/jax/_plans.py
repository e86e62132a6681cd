"""Choose the blocks of each family: the chip's own, cut down to the arrays.

Blocks need not divide the arrays: what lies beyond an array's end is garbage, which the kernels mask where it would
reach a result.  Attention's index maps are the only code here that JAX traces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmkern.jax._chips import Chip
from llmkern.jax._plan import LANES, Block, Plan, cdiv
from llmkern.packed import BLOCK, PANEL

__all__ = ["attention_plan", "decode_plan", "matmul_plan", "packed_plan", "rope_plan", "rows_plan", "visible_blocks"]

SUBLANES = 32
"""Rows of a block are a multiple of this, which suits every dtype, or all there are."""
WIDEST = 2**30
"""Keys that a window sees to one side: it hides nothing then, and added to a position it stays within 32 bits."""
DECODE_KEYS, MOST_PAGES = 128, 16
"""A step reads so many blocks of a paged cache that it has at least these keys; each block is an input of its own."""


def _rows_of(target: int, row_bytes: int, rows: int) -> int:
    """Return how many rows `target` bytes hold."""
    return min(max(target // row_bytes // SUBLANES * SUBLANES, SUBLANES), rows)


def rows_plan(
    kernel: str,
    chip: Chip,
    rows: int,
    hidden: int,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    parameters: Mapping[str, str] | None = None,
    *,
    whole: bool = True,
) -> Plan:
    """Plan a pass over arrays [rows, hidden] that are read and written once; names and dtypes are given.

    parameters: arrays [1, hidden].  An output "scale" is [rows, 1].  whole: a step needs rows as a whole.
    """
    columns = hidden if whole else min(16 * LANES, hidden)
    height = _rows_of(chip.blocks.rows, 4 * columns, rows)

    def block(name: str, dtype: str) -> Block:
        if name == "scale":
            return Block(name, (rows, 1), dtype, (height, 1), lambda i, j: (i, 0))
        return Block(name, (rows, hidden), dtype, (height, columns), lambda i, j: (i, j))

    def parameter(name: str, dtype: str) -> Block:
        return Block(name, (1, hidden), dtype, (1, columns), lambda i, j: (0, j))

    values = ("x", "y", "nan", "amax", "codes") if "scale" in outputs else ("x", "y")
    return Plan(
        kernel,
        chip,
        (cdiv(rows, height), cdiv(hidden, columns)),
        ("parallel", "parallel"),
        (
            *[block(*item) for item in inputs.items()],
            *[parameter(*item) for item in (parameters or {}).items()],
        ),
        tuple([block(*item) for item in outputs.items()]),
        values=tuple([Block(name, (), "float32", (height, columns)) for name in values]),
    )


def _parts(dtype: str, *operands: tuple[int, int]) -> list[Block]:
    """Return the bf16 products that one product takes: the MXU splits an fp32 operand into three in bf16."""
    return [Block("parts", (), "bfloat16", (3, *shape)) for shape in operands] if dtype == "float32" else []


def rope_plan(
    chip: Chip, q: Sequence[int], k: Sequence[int], angles: Sequence[int], dtype: str, angle_dtype: str
) -> Plan:
    """Plan rope: q [B, Hq, S, D], k [B, Hkv, S, D], cos and sin [B or 1, S, D]."""
    batch, heads, length, dim = q
    height = _rows_of(chip.blocks.rows, 4 * (heads + k[1]) * max(dim, LANES), length)

    def vectors(name: str, heads: int) -> Block:
        shape, block = (batch, heads, length, dim), (1, heads, height, dim)
        return Block(name, shape, dtype, block, lambda b, i: (b, 0, i, 0))

    def angle(name: str) -> Block:
        place = (lambda b, i: (b, i, 0)) if angles[0] > 1 else (lambda b, i: (0, i, 0))
        return Block(name, tuple(angles), angle_dtype, (1, height, dim), place)

    return Plan(
        "rope",
        chip,
        (batch, cdiv(length, height)),
        ("parallel", "parallel"),
        (vectors("q", heads), vectors("k", k[1]), angle("cos"), angle("sin")),
        (vectors("q_out", heads), vectors("k_out", k[1])),
        values=tuple([Block(name, (), "float32", (1, heads, height, dim)) for name in ("x", "turned", "rotated")]),
    )


def matmul_plan(
    kernel: str, chip: Chip, m: int, n: int, k: int, dtype: str, w_dtype: str, out_dtype: str, extras: Mapping[str, str]
) -> Plan:
    """Plan a [M, K] of `dtype` times w [N, K] of `w_dtype`, accumulated in s32 or fp32.

    extras: those that there are of a_scale [M, 1], w_scale and bias [1, N], residual [M, N], and their dtypes.
    """
    bm, bn, bk = (min(block, size) for block, size in zip(chip.blocks.matmul, (m, n, k), strict=True))
    forms = {
        "a_scale": ((m, 1), (bm, 1), lambda i, j, s: (i, 0)),
        "w_scale": ((1, n), (1, bn), lambda i, j, s: (0, j)),
        "bias": ((1, n), (1, bn), lambda i, j, s: (0, j)),
        "residual": ((m, n), (bm, bn), lambda i, j, s: (i, j)),
    }
    more = []
    for name, kind in extras.items():
        shape, block, place = forms[name]
        more.append(Block(name, shape, kind, block, place))
    acc = "int32" if dtype == "int8" else "float32"
    # Temporaries: a block's products, the epilogue, and w in the dtype of a.
    values = [Block("products", (), acc, (bm, bn)), Block("y", (), "float32", (bm, bn))]
    if dtype != "int8":
        values += [Block("w", (), dtype, (bn, bk)), *_parts(dtype, (bm, bk), (bn, bk))]
    return Plan(
        kernel,
        chip,
        (cdiv(m, bm), cdiv(n, bn), cdiv(k, bk)),
        ("parallel", "parallel", "arbitrary"),
        (
            Block("a", (m, k), dtype, (bm, bk), lambda i, j, s: (i, s)),
            Block("w", (n, k), w_dtype, (bn, bk), lambda i, j, s: (j, s)),
            *more,
        ),
        (Block("out", (m, n), out_dtype, (bm, bn), lambda i, j, s: (i, j)),),
        (Block("acc", (), acc, (bm, bn)),),
        values=tuple(values),
        operations=2 * m * n * k,
        dtype=dtype,
    )


def packed_plan(chip: Chip, m: int, codes: Sequence[int], dtypes: Mapping[str, str]) -> Plan:
    """Plan x [32, M, blocks] times codes [panels, blocks, bytes], unpacked to x's dtype, accumulated in fp32.

    dtypes: of x, and of those that there are of scale, zero and offset [16 · panels, blocks], bias [1, 16 · panels],
    residual [M, 16 · panels].
    """
    panels, blocks, size = codes
    width, dtype = panels * PANEL, dtypes["x"]
    bm, bn, bk = chip.blocks.packed
    bm, bp, bb = min(bm, m), min(bn // PANEL, panels), min(bk // BLOCK, blocks)
    bn = bp * PANEL
    place = {
        "x": Block("x", (BLOCK, m, blocks), dtype, (BLOCK, bm, bb), lambda i, j, s: (0, i, s)),
        "codes": Block("codes", (panels, blocks, size), "int8", (bp, bb, size), lambda i, j, s: (j, s, 0)),
        "bias": Block("bias", (1, width), dtypes.get("bias", dtype), (1, bn), lambda i, j, s: (0, j)),
        "residual": Block("residual", (m, width), dtypes.get("residual", dtype), (bm, bn), lambda i, j, s: (i, j)),
    }
    per_block = {
        name: Block(name, (width, blocks), "float32", (bn, bb), lambda i, j, s: (j, s))
        for name in ("scale", "zero", "offset")
    }
    return Plan(
        "quantized_linear",
        chip,
        (cdiv(m, bm), cdiv(panels, bp), cdiv(blocks, bb)),
        ("parallel", "parallel", "arbitrary"),
        tuple([(place | per_block)[name] for name in dtypes]),
        (Block("out", (m, width), dtype, (bm, bn), lambda i, j, s: (i, j)),),
        (Block("acc", (), "float32", (bm, bn)), Block("turned", (), "int32", (bp, size, bb))),
        values=(
            Block("codes", (), "int32", (bp, bb, size)),
            *[Block(name, (), "float32", (bn, bb)) for name in ("level", "w")],
            *[Block(name, (), "float32", (bm, bn)) for name in ("products", "y")],
            *_parts(dtype, (bm, bb), (bn, bb)),
        ),
        operations=2 * m * width * blocks * BLOCK,
        dtype=dtype,
    )


def visible_blocks(
    i: Any, *, block_q: int, block_k: int, queries: int, keys: int, left: int, right: int
) -> tuple[Any, Any]:
    """Return the first and last block of keys visible to block `i` of queries; `left`, `right` −1: no limit."""
    from jax import numpy as jnp

    start = i * block_q + (keys - queries)
    end = jnp.minimum((i + 1) * block_q, queries) - 1 + (keys - queries)
    first = 0 if left < 0 else jnp.maximum(start - left, 0) // block_k
    last = cdiv(keys, block_k) - 1
    return first, last if right < 0 else jnp.clip(end + right, 0, keys - 1) // block_k


def attention_plan(
    chip: Chip,
    q: Sequence[int],
    k: Sequence[int],
    dim_v: int,
    dtype: str,
    *,
    mask: tuple[Sequence[int], str] | None,
    padding: bool,
    sinks: bool,
    left: int,
    right: int,
    lse: bool,
) -> Plan:
    """Plan attention: q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv]; mask: shape [4] and dtype."""
    (batch, heads, queries, dim), (_, kv_heads, keys, _) = q, k
    group = heads // kv_heads
    bq, bk = min(chip.blocks.attention[0], queries), min(chip.blocks.attention[1], keys)
    steps = cdiv(keys, bk)

    def seen(i: Any, j: Any) -> Any:
        """Return block j, or the nearest visible one: a block that stays the same is not copied again."""
        if left < 0 and right < 0:
            return j
        from jax import numpy as jnp

        first, last = visible_blocks(i, block_q=bq, block_k=bk, queries=queries, keys=keys, left=left, right=right)
        return jnp.clip(j, first, last)

    def key(name: str, size: int) -> Block:
        shape, block = (batch, kv_heads, keys, size), (1, 1, bk, size)
        return Block(name, shape, dtype, block, lambda b, h, i, j: (b, h // group, seen(i, j), 0))

    def query(name: str, size: int, kind: str = dtype) -> Block:
        return Block(name, (batch, heads, queries, size), kind, (1, 1, bq, size), lambda b, h, i, j: (b, h, i, 0))

    inputs = [query("q", dim), key("k", dim), key("v", dim_v)]
    if mask is not None:
        shape, kind = mask

        def place(*at: Any) -> tuple[Any, ...]:
            b, h, i, j = at
            return tuple([0 if size == 1 else n for size, n in zip(shape, (b, h, i, seen(i, j)), strict=True)])

        block = (1, 1, min(bq, shape[2]), min(bk, shape[3]))
        inputs.append(Block("mask", tuple(shape), kind, block, place))
    if padding:
        inputs.append(Block("padding", (batch, 1, keys), "int32", (1, 1, bk), lambda b, h, i, j: (b, 0, seen(i, j))))
    if sinks:
        inputs.append(Block("sinks", (heads,), "float32", (heads,), memory="smem"))
    return Plan(
        "attention",
        chip,
        (batch, heads, cdiv(queries, bq), steps),
        ("parallel", "parallel", "parallel", "arbitrary"),
        tuple(inputs),
        (query("out", dim_v), *([query("lse", 1, "float32")] if lse else [])),
        _online(bq, dim_v),
        values=(
            *[Block(name, (), "float32", (bq, bk)) for name in ("s", "p", "seen")],
            *_parts(dtype, (bq, dim), (bk, dim), (bq, bk), (bk, dim_v)),
        ),
        operations=2 * batch * heads * _pairs(queries, keys, left, right) * (dim + dim_v),
        dtype=dtype,
    )


def _online(rows: int, dim_v: int) -> tuple[Block, ...]:
    """Return the state of an online softmax: sums of values, maxima, sums of exponentials."""
    return (
        Block("acc", (), "float32", (rows, dim_v)),
        Block("m", (), "float32", (rows, 1)),
        Block("l", (), "float32", (rows, 1)),
    )


def _pairs(queries: int, keys: int, left: int, right: int) -> int:
    """Count the pairs of query and key that the mask keeps."""
    position = np.arange(queries) + (keys - queries)
    first = np.maximum(position - left, 0) if left >= 0 else 0
    last = np.minimum(position + right, keys - 1) if right >= 0 else keys - 1
    return int(np.maximum(np.broadcast_to(last - first + 1, queries), 0).sum())


def decode_plan(
    chip: Chip,
    q: Sequence[int],
    k_cache: Sequence[int],
    dim_v: int,
    dtype: str,
    cache_dtype: str,
    *,
    queries: int,
    pages: int | None,
    sinks: bool,
    left: int,
    lse: bool,
) -> Plan:
    """Plan decode attention: q [B, Hkv, rows, D] with the queries of all heads that share a key head as rows.

    k_cache [B or num_blocks, Hkv, slots, D].  pages: entries of the block table for each sequence, None without one.
    """
    (batch, kv_heads, rows, dim), (blocks, _, slots, _) = q, k_cache
    codes = cache_dtype == "int8"
    together = 1 if pages is None else min(max(DECODE_KEYS // slots, 1), MOST_PAGES, pages)
    bk = min(chip.blocks.decode, slots) if pages is None else slots
    steps = cdiv(slots, bk) if pages is None else cdiv(pages, together)

    def page(part: int, last_dimension: bool) -> Any:
        """Return the place of a step's block number `part`, or of the nearest that holds keys to be seen.

        last_dimension: slots are the last one, not the last but one.
        """

        def place(b: Any, h: Any, j: Any, seq_lens: Any, *table: Any) -> tuple[Any, ...]:
            from jax import numpy as jnp

            last = jnp.maximum(seq_lens[b] - 1, 0) // bk
            first = 0 if left < 0 else jnp.maximum(seq_lens[b] - queries - left, 0) // bk
            n = jnp.clip(j * together + part, first, last)
            block, slot = b, jnp.minimum(n, steps - 1)
            if pages is not None:
                block, slot = jnp.clip(table[0][b, jnp.minimum(n, pages - 1)], 0, blocks - 1), jnp.int32(0)
            return (block, h, 0, slot) if last_dimension else (block, h, slot, 0)

        return place

    def cached(name: str, size: int) -> list[Block]:
        shape, block = (blocks, kv_heads, slots, size), (1, 1, bk, size)
        return [Block(f"{name}{i}", shape, cache_dtype, block, page(i, False)) for i in range(together)]

    def scale(name: str) -> list[Block]:
        shape, block = (blocks, kv_heads, 1, slots), (1, 1, 1, bk)
        return [Block(f"{name}{i}", shape, "float32", block, page(i, True)) for i in range(together)]

    def vectors(name: str, size: int, kind: str = dtype) -> Block:
        shape, block = (batch, kv_heads, rows, size), (1, 1, rows, size)
        return Block(name, shape, kind, block, lambda b, h, j, *_: (b, h, 0, 0))

    inputs = [vectors("q", dim), *cached("k", dim), *cached("v", dim_v)]
    if codes:
        inputs += [*scale("k_scale"), *scale("v_scale")]
    if sinks:
        # One per row: a block's rows belong to several heads.
        inputs.append(Block("sinks", (kv_heads, rows, 1), "float32", (1, rows, 1), lambda b, h, j, *_: (h, 0, 0)))
    prefetch = [Block("seq_lens", (batch,), "int32", (batch,), memory="smem")]
    if pages is not None:
        prefetch.append(Block("block_table", (batch, pages), "int32", (batch, pages), memory="smem"))
    keys = slots if pages is None else slots * pages
    return Plan(
        "attention_decode",
        chip,
        (batch, kv_heads, steps),
        ("parallel", "parallel", "arbitrary"),
        tuple(inputs),
        (vectors("out", dim_v), *([vectors("lse", 1, "float32")] if lse else [])),
        _online(rows, dim_v),
        tuple(prefetch),
        (
            *[Block(name, (), "float32", (rows, bk * together)) for name in ("s", "p", "seen")],
            *[Block(name, (), "float32", (bk * together, size)) for name, size in (("k", dim), ("v", dim_v))],
            *_parts("float32" if codes else dtype, (rows, bk * together), (bk * together, dim), (bk * together, dim_v)),
        ),
        operations=2 * batch * kv_heads * rows * keys * (dim + dim_v),
        dtype="float32" if dtype == "float32" else "bfloat16",
    )
