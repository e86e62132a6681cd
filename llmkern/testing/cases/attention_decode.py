from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmkern.testing.case import Call, Make, each_dtype

_OP = "attention_decode"


def _call(
    make: Make,
    lengths: tuple[int, ...],
    slots: int,
    *,
    queries: int = 1,
    heads: tuple[int, int] = (4, 2),
    dim: int = 16,
    poison: float = math.nan,
    index: torch.dtype = torch.int32,
    sinks: bool = False,
    **options: Any,
) -> Call:
    """A contiguous cache whose slots past each sequence hold `poison`."""
    batch = len(lengths)
    k, v = (make.randn(batch, heads[1], slots, dim) for _ in "kv")
    for b, length in enumerate(lengths):
        k[b, :, length:] = poison
        v[b, :, length:] = poison
    return {
        "q": make.randn(batch, heads[0], queries, dim),
        "k_cache": k,
        "v_cache": v,
        "seq_lens": make.tensor(lengths, index),
        "block_table": None,
        "k_scale": None,
        "v_scale": None,
        "sinks": make.randn(heads[0], scale=2.0) if sinks else None,
        "sm_scale": dim**-0.5,
        "window": [-1, -1],
        "softcap": 0.0,
        "return_lse": False,
        **options,
    }


def _quantized(make: Make, lengths: tuple[int, ...], slots: int, **options: Any) -> Call:
    """A cache in int8, a scale for each head and token; past each sequence the scales are NaN."""
    call = _call(make, lengths, slots, poison=0.0, **options)
    for name in ("k", "v"):
        cache = call[f"{name}_cache"].float()
        scale = cache.abs().amax(-1) / 127
        call[f"{name}_cache"] = (cache / scale[..., None]).nan_to_num().round().to(torch.int8)
        for b, length in enumerate(lengths):
            scale[b, :, length:] = math.nan
        call[f"{name}_scale"] = scale
    return call


def _pages(cache: Tensor, table: Tensor, block_size: int, blocks: int) -> Tensor:
    """The contiguous cache [B, Hkv, slots, …] cut into blocks where `table` says; every other block holds NaN."""
    garbage = math.nan if cache.is_floating_point() else -128
    pages = cache.new_full((blocks, cache.shape[1], block_size, *cache.shape[3:]), garbage)
    for b, row in enumerate(table.tolist()):
        for i, block in enumerate(row):
            if 0 <= block < blocks:
                pages[block] = cache[b, :, i * block_size : (i + 1) * block_size]
    return pages


def _paged(
    make: Make,
    lengths: tuple[int, ...],
    block_size: int,
    *,
    vllm: bool = False,
    contiguous: Callable[..., Call] = _call,
    **options: Any,
) -> Call:
    """Blocks in a shuffled order; table entries past a sequence's end are −1 or far beyond the cache."""
    per_sequence = -(-max(lengths) // block_size) + 1
    call = contiguous(make, lengths, per_sequence * block_size, **options)
    blocks = len(lengths) * per_sequence
    table = make.randn(blocks).float().argsort().reshape(len(lengths), per_sequence).int()
    for b, length in enumerate(lengths):
        used = -(-length // block_size)
        table[b, used:] = 1_000_000 if b % 2 else -1
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        if call[name] is None:
            continue
        pages = _pages(call[name], table, block_size, blocks)
        # vLLM's memory order is [num_blocks, block_size, Hkv, D]
        call[name] = pages.transpose(1, 2).contiguous().transpose(1, 2) if vllm else pages
    return call | {"block_table": table}


def _strided(make: Make) -> Call:
    """A cache kept as [B, S, Hkv, D], queries as their projection leaves them."""
    call = _call(make, (21, 8), 24, poison=1e4)
    for name in ("k_cache", "v_cache"):
        call[name] = call[name].transpose(1, 2).contiguous().transpose(1, 2)
    return call | {"q": make.randn(2, 1, 4, 16).transpose(1, 2)}


CASES = [
    # Without NaN, for opcheck, compile and export.
    *each_dtype(_OP, "24-slots", partial(_call, lengths=(21, 8), slots=24, poison=1e4)),
    *each_dtype(_OP, "24-slots-strided", _strided),
    *each_dtype(_OP, "lse", partial(_call, lengths=(21, 8), slots=24, poison=1e4, return_lse=True)),
    # Garbage past the end
    *each_dtype(_OP, "nan-past-the-end", partial(_call, lengths=(21, 8, 1), slots=24)),
    *each_dtype(_OP, "inf-past-the-end", partial(_call, lengths=(21, 8), slots=24, queries=3, poison=math.inf)),
    *each_dtype(_OP, "no-tokens", partial(_call, lengths=(0, 5, 2), slots=8, queries=3, return_lse=True)),
    *each_dtype(_OP, "no-tokens-sinks", partial(_call, lengths=(0, 5), slots=8, sinks=True, return_lse=True)),
    *each_dtype(_OP, "16-queries", partial(_call, lengths=(40, 16, 9), slots=40, queries=16)),
    *each_dtype(_OP, "9-of-3-heads", partial(_call, lengths=(300,), slots=320, heads=(9, 3), dim=64)),
    *each_dtype(_OP, "mqa-d128", partial(_call, lengths=(33, 3), slots=64, heads=(4, 1), dim=128, queries=2)),
    *each_dtype(_OP, "int64-lengths", partial(_call, lengths=(7, 3), slots=8, index=torch.int64)),
    *each_dtype(_OP, "window", partial(_call, lengths=(21, 3), slots=24, queries=2, window=[5, 0])),
    *each_dtype(_OP, "window-of-all", partial(_call, lengths=(0, 5, 2), slots=8, queries=3, window=[2**31 - 1, 0])),
    *each_dtype(_OP, "softcap", partial(_call, lengths=(21, 3), slots=24, softcap=2.0)),
    *each_dtype(_OP, "sinks", partial(_call, lengths=(21, 3), slots=24, queries=2, sinks=True, window=[7, 0])),
    # Longer than a task of the CPU's kernel, and dimensions that fill no register
    *each_dtype(_OP, "700-slots", partial(_call, lengths=(700, 257), slots=700, queries=2, window=[600, 0])),
    *each_dtype(_OP, "700-slots-sinks", partial(_call, lengths=(700, 0), slots=700, sinks=True, return_lse=True)),
    *[
        case
        for dim in (8, 40, 59, 80, 96, 256)
        for case in each_dtype(_OP, f"d{dim}", partial(_call, lengths=(37, 5), slots=40, heads=(5, 1), dim=dim))
    ],
    # int8
    *each_dtype(_OP, "int8", partial(_quantized, lengths=(21, 8, 1), slots=24)),
    *each_dtype(_OP, "int8-9-of-3-heads", partial(_quantized, lengths=(300,), slots=320, heads=(9, 3), dim=64)),
    *each_dtype(_OP, "int8-16-queries", partial(_quantized, lengths=(40, 9), slots=40, queries=16, dim=40)),
    *each_dtype(_OP, "int8-lse", partial(_quantized, lengths=(21, 0), slots=24, sinks=True, return_lse=True)),
    *each_dtype(_OP, "int8-paged", partial(_paged, lengths=(40, 16), block_size=16, vllm=True, contiguous=_quantized)),
    # Paged
    *each_dtype(_OP, "paged-4", partial(_paged, lengths=(21, 8, 1), block_size=4)),
    *each_dtype(_OP, "paged-16-vllm", partial(_paged, lengths=(40, 16), block_size=16, queries=4, vllm=True)),
    *each_dtype(_OP, "paged-no-tokens", partial(_paged, lengths=(0, 9), block_size=4, return_lse=True)),
    *each_dtype(_OP, "paged-sinks", partial(_paged, lengths=(21, 8), block_size=4, sinks=True, window=[9, 0])),
    *each_dtype(_OP, "0-batch", partial(_call, lengths=(), slots=8), dtypes=(torch.float32,)),
]
