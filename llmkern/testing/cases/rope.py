from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from llmkern.testing.case import Call, Make, each_dtype


def _call(
    make: Make,
    q: tuple[int, int, int, int],
    *,
    kv_heads: int = 1,
    rotary_dim: int | None = None,
    width: int | None = None,
    batch: int = 1,
    interleaved: bool = False,
    angles: torch.dtype | None = None,
) -> Call:
    """cos and sin of unrelated angles in each dimension: nothing may rely on a pair's being equal."""
    b, _, length, dim = q
    rotary_dim = rotary_dim or dim
    angle = make.randn(batch, length, width or rotary_dim, scale=3.0, dtype=torch.float32)
    return {
        "q": make.randn(*q),
        "k": make.randn(b, kv_heads, length, dim),
        "cos": angle.cos().to(angles or make.dtype),
        "sin": angle.sin().to(angles or make.dtype),
        "rotary_dim": rotary_dim,
        "interleaved": interleaved,
    }


def _transposed(make: Make) -> Call:
    """Inputs as attention modules make them: [B, S, H, D] seen as [B, H, S, D], q and k cut from one projection."""
    packed = make.randn(2, 5, 6, 32).transpose(1, 2)
    return _call(make, (2, 4, 5, 32), kv_heads=2) | {"q": packed[:, :4], "k": packed[:, 4:]}


def _last_dimension_strided(make: Make) -> Call:
    call = _call(make, (1, 3, 4, 16))
    return call | {"q": make.randn(1, 3, 16, 4).transpose(2, 3), "cos": make.randn(1, 16, 4).transpose(1, 2)}


def _nan(make: Make) -> Call:
    call = _call(make, (1, 2, 3, 8), rotary_dim=6)
    call["q"][0, 0, 1, 2] = float("nan")
    call["k"][0, 0, 2, 7] = float("nan")
    return call


_FORMS: dict[str, Callable[[Make], Call]] = {
    "1x9x1x64-decode": partial(_call, q=(1, 9, 1, 64), kv_heads=3),
    "2x4x7x8": partial(_call, q=(2, 4, 7, 8), kv_heads=2, batch=2),
    "1x2x3x2": partial(_call, q=(1, 2, 3, 2)),
    "1x3x5x80-partial": partial(_call, q=(1, 3, 5, 80), rotary_dim=20),
    "2x3x5x64-per-pair": partial(_call, q=(2, 3, 5, 64), width=32),
    "2x3x5x64-interleaved": partial(_call, q=(2, 3, 5, 64), interleaved=True),
    "2x3x5x64-interleaved-per-pair": partial(_call, q=(2, 3, 5, 64), width=32, interleaved=True, batch=2),
    "1x3x5x36-interleaved-partial": partial(_call, q=(1, 3, 5, 36), rotary_dim=6, interleaved=True),
    "2x4x5x32-transposed": _transposed,
    "1x3x4x16-last-dimension-strided": _last_dimension_strided,
    "1x4x130x128": partial(_call, q=(1, 4, 130, 128), kv_heads=4),
}
CASES = [
    *[case for name, build in _FORMS.items() for case in each_dtype("rope", name, build, differentiable=("q", "k"))],
    *each_dtype(
        "rope",
        "2x3x5x64-fp32-angles",
        partial(_call, q=(2, 3, 5, 64), angles=torch.float32),
        dtypes=(torch.bfloat16, torch.float16),
        differentiable=("q", "k"),
    ),
    *each_dtype("rope", "nan", _nan, dtypes=(torch.float32, torch.bfloat16)),
    *each_dtype("rope", "0x2x3x8-empty", partial(_call, q=(0, 2, 3, 8)), dtypes=(torch.float32,)),
    *each_dtype("rope", "2x2x0x8-empty", partial(_call, q=(2, 2, 0, 8)), dtypes=(torch.float32,)),
]
