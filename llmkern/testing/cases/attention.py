from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmkern.testing.case import Call, Case, Make, each_dtype

__all__ = ["CASES", "plain_call", "random_call"]

_OP = "attention"


def plain_call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Call:
    """The call of these tensors in which every other argument has its default, where `options` do not replace it."""
    return {
        "q": q,
        "k": k,
        "v": v,
        "attn_mask": None,
        "key_padding_mask": None,
        "sinks": None,
        "causal": False,
        "sm_scale": q.shape[3] ** -0.5,
        "window": [-1, -1],
        "softcap": 0.0,
        "return_lse": False,
        **options,
    }


def random_call(
    make: Make,
    queries: int,
    keys: int,
    *,
    batch: int = 1,
    heads: tuple[int, int] = (2, 1),
    dim: int = 16,
    **options: Any,
) -> Call:
    """Random q, k and v with (query, key) heads; `options` replace arguments of the plain call."""
    q = make.randn(batch, heads[0], queries, dim)
    k, v = (make.randn(batch, heads[1], keys, dim) for _ in "kv")
    return plain_call(q, k, v) | options


def _bool_mask(make: Make, *shape: int) -> Tensor:
    return make.randint(0, 3, *shape, dtype=torch.int64) > 0


def _padding(make: Make, keys: int, lengths: tuple[int, ...], side: str) -> Tensor:
    """bool [B, keys] with `lengths` real keys in each row; padded on the left or the right."""
    position = make.tensor(range(keys), torch.int64)
    if side == "left":
        position = keys - 1 - position
    return position < make.tensor(lengths, torch.int64)[:, None]


def _masked(make: Make, *shape: int, queries: int, keys: int, **options: Any) -> Call:
    return random_call(make, queries, keys, batch=2, heads=(4, 2), attn_mask=_bool_mask(make, *shape), **options)


def _padded(make: Make, side: str, queries: int, keys: int, **options: Any) -> Call:
    """Three sequences: one is whole, one padded, and one has no key at all."""
    mask = _padding(make, keys, (keys, keys // 2, 0), side)
    return random_call(make, queries, keys, batch=3, heads=(4, 2), key_padding_mask=mask, **options)


def _biased(make: Make, batch: int = 1, **options: Any) -> Call:
    """A learned bias for each head and pair of positions, shared by the batch (T5: Raffel et al. 2020)."""
    bias = make.randn(batch, 4, 9, 11, scale=2.0)
    return random_call(make, 9, 11, batch=2, heads=(4, 2), attn_mask=bias, **options)


def _additive(make: Make, hidden: float) -> Call:
    """A model's padding mask as numbers: `hidden` on the hidden keys, in row 3 on all of them."""
    visible = _bool_mask(make, 2, 1, 9, 11)
    visible[0, :, 3] = False
    mask = make.randn(2, 1, 9, 11, scale=0.0)
    return random_call(make, 9, 11, batch=2, heads=(4, 2), attn_mask=mask.masked_fill(~visible, hidden))


def _fp32_mask(make: Make) -> Call:
    """Numbers in fp32 beside half-precision inputs; no row is hidden as a whole, where −1e9 would round scores away."""
    mask = make.randn(2, 1, 9, 11, dtype=torch.float32)
    return random_call(make, 9, 11, batch=2, heads=(4, 2), attn_mask=mask.masked_fill(mask > 1, -1e9))


def _lowest(make: Make) -> Call:
    return _additive(make, torch.finfo(make.dtype).min)


def _with_sinks(make: Make, queries: int, keys: int, **options: Any) -> Call:
    return random_call(make, queries, keys, batch=2, heads=(4, 2), sinks=make.randn(4, scale=2.0), **options)


def _everything(make: Make) -> Call:
    return _with_sinks(
        make,
        9,
        14,
        attn_mask=make.randn(1, 4, 9, 14),
        key_padding_mask=_padding(make, 14, (14, 6), "left"),
        causal=True,
        window=[4, 4],
        softcap=3.0,
        return_lse=True,
    )


def _projected(make: Make) -> Call:
    """Inputs as models make them: views of [B, S, H, D], v a slice of a fused projection."""
    call = random_call(make, 19, 19, batch=2, heads=(6, 3), dim=40, causal=True)
    fused = make.randn(2, 19, 3, 2 * 40)
    k, v = fused.transpose(1, 2).split(40, -1)
    return call | {"q": make.randn(2, 19, 6, 40).transpose(1, 2), "k": k, "v": v}


def _expanded_mask(make: Make) -> Call:
    """A mask already expanded by its caller: strides of 0."""
    return random_call(make, 9, 11, batch=2, heads=(4, 2), attn_mask=_bool_mask(make, 2, 1, 1, 11).expand(2, 4, 9, 11))


def _wider_values(make: Make) -> Call:
    return random_call(make, 9, 11, heads=(4, 2)) | {"v": make.randn(1, 2, 11, 24)}


def _nan(make: Make, name: str, queries: int, keys: int, **options: Any) -> Call:
    """One NaN, in head 0 at the last position but one."""
    call = random_call(make, queries, keys, **options)
    call[name][0, 0, call[name].shape[2] - 2, 3] = math.nan
    return call


def _in_each_dtype(name: str, build: Callable[[Make], Call], *extra_grads: str) -> list[Case]:
    """Gradients are compared in float64, so that one dtype's inputs are enough."""
    grads = ("q", "k", "v", *extra_grads)
    return [
        *each_dtype(_OP, name, build, dtypes=(torch.float32,), differentiable=grads),
        *each_dtype(_OP, name, build, dtypes=(torch.bfloat16, torch.float16)),
    ]


def _in_fp32(name: str, build: Callable[[Make], Call]) -> list[Case]:
    return each_dtype(_OP, name, build, dtypes=(torch.float32,))


CASES = [
    *_in_each_dtype("17x17-gqa-causal", partial(random_call, queries=17, keys=17, batch=2, heads=(4, 2), causal=True)),
    # sizes
    *_in_each_dtype("1x1", partial(random_call, queries=1, keys=1)),
    *_in_each_dtype("1x1023", partial(random_call, queries=1, keys=1023, heads=(3, 1), dim=64)),
    *_in_each_dtype("239x1", partial(random_call, queries=239, keys=1)),
    *_in_each_dtype("113x203", partial(random_call, queries=113, keys=203)),
    *_in_each_dtype("37x3", partial(random_call, queries=37, keys=3, dim=40)),
    *[
        case
        for dim in (64, 96, 128, 256)
        for case in _in_each_dtype(f"20x33-d{dim}", partial(random_call, queries=20, keys=33, dim=dim))
    ],
    *_in_each_dtype("33x33-9-of-3-heads", partial(random_call, queries=33, keys=33, heads=(9, 3), dim=64, causal=True)),
    *_in_each_dtype("1x70-9-of-3-heads", partial(random_call, queries=1, keys=70, heads=(9, 3), dim=64, causal=True)),
    *_in_each_dtype("9x11-mha", partial(random_call, queries=9, keys=11, heads=(3, 3))),
    *_in_each_dtype("9x11-mqa", partial(random_call, queries=9, keys=11, batch=2, heads=(5, 1))),
    *_in_each_dtype("9x11-values-of-24", _wider_values),
    *_in_each_dtype("9x11-scale", partial(random_call, queries=9, keys=11, sm_scale=1.7)),
    *_in_each_dtype("19x19-strided", _projected),
    # causal and windows, aligned to the bottom right
    *_in_each_dtype("5x12-causal", partial(random_call, queries=5, keys=12, causal=True)),
    *_in_each_dtype("12x5-causal-unseeing-rows", partial(random_call, queries=12, keys=5, causal=True)),
    *_in_each_dtype("30x30-window", partial(random_call, queries=30, keys=30, causal=True, window=[6, 6])),
    *_in_each_dtype("1x40-window", partial(random_call, queries=1, keys=40, heads=(4, 2), causal=True, window=[6, 0])),
    *_in_each_dtype("7x30-window-both-sides", partial(random_call, queries=7, keys=30, window=[4, 2])),
    *_in_each_dtype("12x5-window-right", partial(random_call, queries=12, keys=5, window=[-1, 1])),
    *_in_each_dtype("12x5-window-of-all", partial(random_call, queries=12, keys=5, window=[2**31 - 1, 2**31 - 1])),
    *_in_fp32("9x11-window-of-one", partial(random_call, queries=9, keys=11, window=[0, 0])),
    # masks
    *_in_each_dtype("9x11-mask-11qk", lambda make: _masked(make, 1, 1, 9, 11, queries=9, keys=11)),
    *_in_each_dtype("9x11-mask-b11k", lambda make: _masked(make, 2, 1, 1, 11, queries=9, keys=11)),
    *_in_fp32("9x11-mask-bhqk", lambda make: _masked(make, 2, 4, 9, 11, queries=9, keys=11)),
    *_in_fp32("9x11-mask-11q1", lambda make: _masked(make, 1, 1, 9, 1, queries=9, keys=11)),
    *_in_fp32("1x11-mask-bh1k", lambda make: _masked(make, 2, 4, 1, 11, queries=1, keys=11)),
    *_in_fp32("11x11-mask-causal", lambda make: _masked(make, 2, 1, 11, 11, queries=11, keys=11, causal=True)),
    *_in_fp32("3x40-mask-window", lambda make: _masked(make, 2, 1, 3, 40, queries=3, keys=40, window=[5, 0])),
    *_in_fp32("9x11-mask-expanded", _expanded_mask),
    *_in_each_dtype("9x11-bias", _biased, "attn_mask"),
    *_in_fp32("9x11-bias-per-sequence", partial(_biased, batch=2)),
    *_in_each_dtype("9x11-bias-causal", partial(_biased, causal=True, return_lse=True), "attn_mask"),
    *_in_each_dtype("9x11-additive-infinite", partial(_additive, hidden=-math.inf), "attn_mask"),
    *_in_each_dtype("9x11-additive-lowest", _lowest, "attn_mask"),
    *each_dtype(
        _OP,
        "9x11-additive-fp32",
        _fp32_mask,
        dtypes=(torch.bfloat16, torch.float16),
    ),
    *_in_each_dtype("9x11-padded-right", partial(_padded, side="right", queries=9, keys=11)),
    *_in_each_dtype("11x11-padded-left", partial(_padded, side="left", queries=11, keys=11, causal=True)),
    *_in_fp32("1x40-padded-window", partial(_padded, side="left", queries=1, keys=40, causal=True, window=[30, 0])),
    # softcap, sinks, log-sum-exp
    *_in_each_dtype("13x13-softcap", partial(random_call, queries=13, keys=13, heads=(4, 2), causal=True, softcap=2.0)),
    *_in_each_dtype("1x40-softcap", partial(random_call, queries=1, keys=40, heads=(4, 2), causal=True, softcap=50.0)),
    *_in_each_dtype("11x11-softcap-padded", partial(_padded, side="left", queries=11, keys=11, softcap=2.0)),
    *_in_each_dtype("9x11-softcap-bias", partial(_biased, softcap=2.0), "attn_mask"),
    *_in_each_dtype("13x13-sinks", partial(_with_sinks, queries=13, keys=13, causal=True, window=[7, 0]), "sinks"),
    *_in_each_dtype("12x5-sinks-lse", partial(_with_sinks, queries=12, keys=5, causal=True, return_lse=True), "sinks"),
    *_in_each_dtype("9x11-lse", partial(random_call, queries=9, keys=11, return_lse=True)),
    *_in_each_dtype("11x11-padded-lse", partial(_padded, side="right", queries=11, keys=11, return_lse=True)),
    *_in_each_dtype("9x14-everything", _everything, "attn_mask", "sinks"),
    # nothing to attend to, and NaN
    *_in_fp32("0-batch", partial(random_call, queries=3, keys=4, batch=0)),
    *_in_fp32("0-queries", partial(random_call, queries=0, keys=4, causal=True)),
    *_in_fp32("0-keys", partial(random_call, queries=3, keys=0)),
    *_in_fp32("0-keys-sinks-lse", partial(_with_sinks, queries=3, keys=0, return_lse=True)),
    *_in_fp32("nan-query", partial(_nan, name="q", queries=20, keys=33)),
    *_in_fp32("nan-query-few-keys", partial(_nan, name="q", queries=6, keys=6, causal=True)),
    *_in_fp32("nan-query-one-row", partial(_nan, name="q", queries=2, keys=3, return_lse=True)),
    *_in_fp32("nan-key", partial(_nan, name="k", queries=6, keys=9, return_lse=True)),
    *_in_fp32("nan-value", partial(_nan, name="v", queries=6, keys=9)),
    *_in_fp32("nan-key-softcap", partial(_nan, name="k", queries=6, keys=9, softcap=2.0)),
]
