from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkern.backends.triton._attention import (
    as_bytes,
    features,
    inner_contiguous,
    mask_strides,
    padded,
    refuse_dims,
    shape_class,
    strides,
)
from llmkern.backends.triton._configs import config
from llmkern.backends.triton._declare import serves
from llmkern.backends.triton._launch import launch, target_of


def _refuse(k: Tensor, v: Tensor, **_: object) -> str | None:
    return refuse_dims(k, v)


# Without a log-sum-exp the backward would have to walk all scores once more.
@serves("attention", has_backward=True, refuse=_refuse, for_gradient={"return_lse": True})
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
    batch, heads, queries, _ = q.shape
    out = torch.empty((batch, queries, heads, v.shape[3]), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((batch, heads, queries) if return_lse else (0,), dtype=torch.float32, device=q.device)
    launch_forward(
        q, k, v, attn_mask, key_padding_mask, sinks, causal, sm_scale, window, softcap, out, lse if return_lse else None
    )
    return out, lse


def launch_forward(
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
    out: Tensor,
    lse: Tensor | None,
    *,
    stats: bool = False,
) -> None:
    """stats: instead of the attention, the row maxima go to `out` and the sums of exponentials to `lse`."""
    from llmkern.backends.triton._kernels.attention import attention_kernel

    if out.numel() == 0:
        return
    batch, heads, queries, dim = q.shape
    keys, dim_v = k.shape[2], v.shape[3]
    q, k, v = inner_contiguous(q), inner_contiguous(k), inner_contiguous(v)
    mask, padding = as_bytes(attn_mask), as_bytes(key_padding_mask)
    band, switches = features(attn_mask, causal, window, softcap)
    chosen = config("attention", shape_class(q, v), target_of(q))
    launch(
        attention_kernel,
        (-(-queries // chosen["BLOCK_M"]) * batch * heads, 1, 1),
        q,
        k,
        v,
        mask,
        padding,
        sinks if sinks is None else sinks.contiguous(),
        out,
        lse,
        heads,
        heads // k.shape[1],
        queries,
        keys,
        *strides(q),
        *strides(k),
        *strides(v),
        *strides(out),
        *mask_strides(mask),
        *((0, 0) if padding is None else padding.stride()),
        sm_scale,
        softcap,
        *band,
        **switches,
        STATS=stats,
        DIM=dim,
        DIM_V=dim_v,
        PADDED=padded(dim),
        PADDED_V=padded(dim_v),
        **chosen,
    )
