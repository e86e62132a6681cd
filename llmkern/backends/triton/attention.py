from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llmkern.backends.triton._attention import (
    as_bytes,
    features,
    head_dims,
    mask_strides,
    refuse_dims,
    shape_class,
    with_strides,
)
from llmkern.backends.triton._configs import config
from llmkern.backends.triton._declare import serves
from llmkern.backends.triton._launch import Kernel, launch, target_of
from llmkern.ops.attention import lse_like, out_like

ATTENTION_KERNEL = Kernel("attention", "attention_kernel")


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
    out, lse = out_like(q, v), lse_like(q, return_lse)
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
    if out.numel() == 0:
        return
    batch, heads, queries, dim = q.shape
    _, kv_heads, keys, _ = k.shape
    dims = head_dims(dim, v.shape[3])
    (q, q_strides), (k, k_strides), (v, v_strides) = with_strides(q), with_strides(k), with_strides(v)
    mask, padding = as_bytes(attn_mask), as_bytes(key_padding_mask)
    band, switches = features(attn_mask, causal, window, softcap)
    chosen = config("attention", shape_class(q.dtype, dims), target_of(q))
    launch(
        ATTENTION_KERNEL,
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
        heads // kv_heads,
        queries,
        keys,
        *q_strides,
        *k_strides,
        *v_strides,
        *out.stride()[:3],
        *mask_strides(mask),
        *((0, 0) if padding is None else padding.stride()),
        sm_scale,
        softcap,
        *band,
        **switches,
        STATS=stats,
        **dims,
        **chosen,
    )
