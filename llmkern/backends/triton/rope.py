from __future__ import annotations

from torch import Tensor

from llmkern.backends.triton._configs import config
from llmkern.backends.triton._declare import serves
from llmkern.backends.triton._launch import Kernel, contiguous_like, launch, next_power_of_2, target_of

ROPE_KERNEL = Kernel("rope", "rope_kernel")


@serves("rope", has_backward=True)
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    q_out, k_out = contiguous_like(q), contiguous_like(k)
    batch, q_heads, length, dim = q.shape
    k_heads = k.shape[1]
    q_rows, k_rows = batch * q_heads * length, batch * k_heads * length
    if q_rows + k_rows == 0:
        return q_out, k_out
    rest = dim - rotary_dim
    chosen = config("rope", "any", target_of(q))
    launch(
        ROPE_KERNEL,
        (-(-q_rows // chosen["ROWS"]) - (-k_rows // chosen["ROWS"]), 1, 1),
        q,
        k,
        cos,
        sin,
        q_out,
        k_out,
        q_rows,
        k_rows,
        q_heads,
        k_heads,
        length,
        dim,
        *q.stride(),
        *k.stride(),
        *_strides(cos),
        *_strides(sin),
        ROTARY=rotary_dim,
        PER_PAIR=cos.shape[2] != rotary_dim,
        INTERLEAVED=interleaved,
        PAIRS=next_power_of_2(rotary_dim // 2),
        REST=next_power_of_2(rest) if rest else 0,
        **chosen,
    )
    return q_out, k_out


def _strides(angles: Tensor) -> tuple[int, int, int]:
    """Return the strides of angles [B or 1, S, W]; a batch of 1 is broadcast to every sequence."""
    batch, position, dim = angles.stride()
    return 0 if angles.shape[0] == 1 else batch, position, dim
