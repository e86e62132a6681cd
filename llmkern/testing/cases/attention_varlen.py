from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmkern.testing.case import Call, Make, each_dtype

_OP = "attention_varlen"


def _sums(make: Make, lengths: tuple[int, ...]) -> Tensor:
    """int32 [B + 1]: where each sequence begins, and the end."""
    return make.tensor([sum(lengths[:b]) for b in range(len(lengths) + 1)], torch.int32)


def _call(
    make: Make,
    queries: tuple[int, ...],
    keys: tuple[int, ...] | None = None,
    *,
    heads: tuple[int, int] = (4, 2),
    dim: int = 16,
    dim_v: int | None = None,
    sinks: bool = False,
    padding: int = 0,
    **options: Any,
) -> Call:
    """Packed keys, as many as queries where not given; `padding` rows of q are in no sequence."""
    keys = queries if keys is None else keys
    return {
        "q": make.randn(sum(queries) + padding, heads[0], dim),
        "k": make.randn(sum(keys), heads[1], dim),
        "v": make.randn(sum(keys), heads[1], dim if dim_v is None else dim_v),
        "cu_seqlens_q": _sums(make, queries),
        "cu_seqlens_k": _sums(make, keys),
        "seqused_k": None,
        "block_table": None,
        "sinks": make.randn(heads[0], scale=2.0) if sinks else None,
        "causal": True,
        "sm_scale": dim**-0.5,
        "window": [-1, -1],
        "softcap": 0.0,
        "return_lse": False,
        **options,
    }


def _cached(
    make: Make, queries: tuple[int, ...], keys: tuple[int, ...], slots: int, poison: float = math.nan, **options: Any
) -> Call:
    """The same keys in a cache [B, slots, Hkv, D]; slots past a sequence's end hold `poison`."""
    call = _call(make, queries, keys, **options)
    starts = call["cu_seqlens_k"].tolist()
    for name in ("k", "v"):
        cache = call[name].new_full((len(keys), slots, *call[name].shape[1:]), poison)
        for b, length in enumerate(keys):
            cache[b, :length] = call[name][starts[b] : starts[b + 1]]
        call[name] = cache
    return call | {"cu_seqlens_k": None, "seqused_k": make.tensor(keys, torch.int32)}


def _paged(
    make: Make,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    block_size: int,
    *,
    freed: int = 0,
    poison: float = math.nan,
    **options: Any,
) -> Call:
    """The same keys in pages in a shuffled order; table entries past a sequence's end, and of its first `freed` pages,
    are wild, and those pages hold `poison`."""
    per_sequence = -(-max(keys) // block_size) + 1
    call = _cached(make, queries, keys, per_sequence * block_size, poison, **options)
    blocks = len(keys) * per_sequence
    table = make.randn(blocks).float().argsort().reshape(len(keys), per_sequence).int()
    for name in ("k", "v"):
        pages = torch.full_like(call[name], poison).reshape(blocks, block_size, *call[name].shape[2:])
        for b, length in enumerate(keys):
            for i in range(min(freed, length // block_size), -(-length // block_size)):
                pages[table[b, i]] = call[name][b, i * block_size : (i + 1) * block_size]
        call[name] = pages
    for b, length in enumerate(keys):
        table[b, -(-length // block_size) :] = 1_000_000 if b % 2 else -1
        table[b, : min(freed, length // block_size)] = -1
    return call | {"block_table": table}


def _head_major(make: Make, **options: Any) -> Call:
    """Pages as attention_decode's cache has them, [blocks, Hkv, block_size, D], and q as its projection leaves it."""
    call = _paged(make, (3, 20, 1), (30, 20, 9), 8, **options)
    for name in ("k", "v"):
        call[name] = call[name].transpose(1, 2).contiguous().transpose(1, 2)
    fused = make.randn(24, 4, 3 * 16)
    return call | {"q": fused[..., 16:32]}


# A step of continuous batching: a prompt, tokens that are decoded, chunks of prompts; some with nothing in it.
MIXED, PAST = (20, 1, 0, 17, 1, 5), (20, 33, 7, 60, 1, 21)

CASES = [
    # Without NaN, for opcheck, compile and export.
    *each_dtype(_OP, "prompts", partial(_call, queries=(19, 3, 30))),
    *each_dtype(_OP, "mixed-pages", partial(_paged, queries=MIXED, keys=PAST, block_size=8, poison=1e4)),
    *each_dtype(
        _OP, "cache-lse", partial(_cached, queries=(3, 18), keys=(21, 30), slots=32, poison=1e4, return_lse=True)
    ),
    # Lengths
    *each_dtype(_OP, "no-sequences", partial(_call, queries=()), dtypes=(torch.float32,)),
    *each_dtype(_OP, "empty-ones", partial(_call, queries=(0, 5, 0, 0, 18, 0), return_lse=True)),
    *each_dtype(_OP, "no-keys", partial(_call, queries=(3, 18, 2), keys=(0, 0, 5), return_lse=True)),
    *each_dtype(_OP, "no-keys-sinks", partial(_call, queries=(3, 18), keys=(0, 0), sinks=True, return_lse=True)),
    *each_dtype(_OP, "more-queries-than-keys", partial(_call, queries=(9, 40), keys=(4, 11), return_lse=True)),
    *each_dtype(_OP, "rows-outside", partial(_call, queries=(2, 20), padding=5, return_lse=True)),
    *each_dtype(_OP, "one-query-each", partial(_paged, queries=(1,) * 5, keys=(300, 1, 129, 128, 40), block_size=16)),
    *each_dtype(_OP, "16-and-17-queries", partial(_call, queries=(16, 17), keys=(40, 40))),
    *each_dtype(_OP, "across-tiles", partial(_call, queries=(131, 70), keys=(203, 70), heads=(3, 1), dim=64)),
    # Not causal, windows
    *each_dtype(_OP, "encoder", partial(_call, queries=(7, 33, 1), causal=False)),
    *each_dtype(_OP, "across", partial(_call, queries=(7, 20, 1), keys=(12, 50, 9), causal=False)),
    *each_dtype(_OP, "window", partial(_call, queries=(40, 3, 1), keys=(60, 30, 25), window=[6, 0])),
    *each_dtype(_OP, "window-both-sides", partial(_call, queries=(7, 30), keys=(20, 30), causal=False, window=[4, 2])),
    *each_dtype(_OP, "window-of-all", partial(_call, queries=(7, 30), window=[2**31 - 1, 2**31 - 1])),
    *each_dtype(
        _OP,
        "freed-pages",
        partial(_paged, queries=(18, 2, 1), keys=(50, 40, 33), block_size=4, freed=4, window=[12, 0]),
    ),
    # Caches
    *each_dtype(_OP, "cache", partial(_cached, queries=(1, 18, 0), keys=(21, 30, 5), slots=32)),
    *each_dtype(_OP, "pages-of-1", partial(_paged, queries=(18, 2), keys=(23, 9), block_size=1)),
    *each_dtype(_OP, "pages-exactly-full", partial(_paged, queries=(32, 16, 1), keys=(32, 48, 16), block_size=16)),
    *each_dtype(_OP, "pages-one-past", partial(_paged, queries=(17, 1), keys=(33, 17), block_size=16)),
    *each_dtype(_OP, "pages-head-major", _head_major),
    *each_dtype(_OP, "mixed-nan", partial(_paged, queries=MIXED, keys=PAST, block_size=8, return_lse=True)),
    # Features, dimensions
    *each_dtype(_OP, "softcap-sinks", partial(_paged, queries=MIXED, keys=PAST, block_size=8, softcap=3.0, sinks=True)),
    *each_dtype(_OP, "9-of-3-heads", partial(_call, queries=(33, 1), keys=(33, 50), heads=(9, 3), dim=64)),
    *each_dtype(_OP, "mqa-values-of-24", partial(_call, queries=(18, 2), heads=(5, 1), dim_v=24)),
    *[
        case
        for dim in (8, 59, 80, 256)
        for case in each_dtype(_OP, f"d{dim}", partial(_call, queries=(20, 2), keys=(33, 5), heads=(2, 1), dim=dim))
    ],
]
