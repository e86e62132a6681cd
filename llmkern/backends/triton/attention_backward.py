from __future__ import annotations

from collections.abc import Sequence

import torch
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
from llmkern.backends.triton.attention import launch_forward

DELTA_KERNEL = Kernel("attention_backward", "delta_kernel")
DKV_KERNEL = Kernel("attention_backward", "dkv_kernel")
DMASK_KERNEL = Kernel("attention_backward", "dmask_kernel")
DQ_KERNEL = Kernel("attention_backward", "dq_kernel")

DELTA_ROWS = 16


def _refuse(k: Tensor, v: Tensor, **_: object) -> str | None:
    return refuse_dims(k, v)


@serves("attention_backward", refuse=_refuse)
def attention_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    sm_scale: float,
    window: Sequence[int],
    softcap: float,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Zeros, since nothing is launched where there are no queries or no keys.
    make = torch.empty if q.numel() and k.numel() else torch.zeros
    dq, dk, dv = (make(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dmask, dsinks = q.new_empty(0), q.new_empty(0)
    if attn_mask is not None and mask_grad:
        dmask = make(attn_mask.shape, dtype=attn_mask.dtype, device=q.device)
    batch, heads, queries, dim = q.shape
    kv_heads, keys, dim_v = k.shape[1], k.shape[2], v.shape[3]
    (q, q_strides), (k, k_strides), (v, v_strides) = with_strides(q), with_strides(k), with_strides(v)
    (dout, dout_strides), (out, out_strides) = with_strides(dout), with_strides(out)
    dims = head_dims(dim, dim_v)

    delta = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if delta.numel():
        launch(
            DELTA_KERNEL,
            (-(-delta.numel() // DELTA_ROWS), 1, 1),
            dout,
            out,
            dlse.contiguous() if dlse.numel() else None,
            delta,
            delta.numel(),
            heads,
            queries,
            *dout_strides,
            *out_strides,
            DIM_V=dim_v,
            PADDED_V=dims["PADDED_V"],
            ROWS=DELTA_ROWS,
            num_warps=4,
        )
    shift, total = lse, None
    additive = attn_mask is not None and attn_mask.dtype != torch.bool
    if additive or lse.numel() == 0 or q.dtype == torch.float32:
        shift, total = torch.empty_like(delta), torch.empty_like(delta)
        launch_forward(
            q, k, v, attn_mask, key_padding_mask, sinks, causal, sm_scale, window, softcap, shift, total, stats=True
        )
    if sinks is not None:
        dsinks = _dsinks(sinks, shift, total, delta)
    if q.numel() == 0 or k.numel() == 0:
        return dq, dk, dv, dmask, dsinks

    mask, padding = as_bytes(attn_mask), as_bytes(key_padding_mask)
    band, switches = features(attn_mask, causal, window, softcap)
    chosen = config("attention_backward", shape_class(q.dtype, dims), target_of(q))
    block_m, block_n = chosen["BLOCK_M"], chosen["BLOCK_N"]
    inputs = (q, k, v, dout, mask, padding, shift.contiguous(), total, delta)
    numbers = (
        *q_strides,
        *k_strides,
        *v_strides,
        *dout_strides,
        *mask_strides(mask),
        *((0, 0) if padding is None else padding.stride()),
        sm_scale,
        softcap,
        *band,
    )
    constants = {**switches, **dims, **chosen}
    shape = (heads, heads // kv_heads, queries, keys)
    launch(DKV_KERNEL, (-(-keys // block_n) * batch * kv_heads, 1, 1), *inputs, dk, dv, *shape, *numbers, **constants)
    # A query's tile walks the keys as a key's tile walks the queries: the larger of the two sizes stays put.
    constants |= {"BLOCK_M": block_n, "BLOCK_N": block_m}
    launch(DQ_KERNEL, (-(-queries // block_n) * batch * heads, 1, 1), *inputs, dq, *shape, *numbers, **constants)
    if dmask.numel() and attn_mask is not None:
        mask_batches, mask_heads, mask_rows, mask_columns = attn_mask.shape
        one_row, one_column = mask_rows == 1, mask_columns == 1
        # Fewer queries: this kernel holds a tile of the mask's gradient besides.
        block_n = min(block_n, 16 if dims["PADDED"] > 128 else 32)
        constants |= {"BLOCK_M": block_n, "num_warps": min(chosen["num_warps"], 8)}
        tiles = (1 if one_row else -(-mask_rows // block_n)) * (1 if one_column else -(-mask_columns // block_m))
        launch(
            DMASK_KERNEL,
            (tiles * mask_batches * mask_heads, 1, 1),
            *inputs,
            dmask,
            batch,
            *shape,
            *attn_mask.shape,
            *numbers,
            ONE_ROW=one_row,
            ONE_COLUMN=one_column,
            **constants,
        )
    return dq, dk, dv, dmask, dsinks


def _dsinks(sinks: Tensor, shift: Tensor, total: Tensor | None, delta: Tensor) -> Tensor:
    """The sink's value is 0, so that only −P_sink·Δ is left of its gradient."""
    weights = torch.exp(sinks.float()[:, None] - shift)
    if total is not None:
        weights = weights / total
    return -(weights * delta).sum((0, 2)).to(sinks.dtype)
