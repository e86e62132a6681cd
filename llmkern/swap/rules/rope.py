"""Rotary embedding: attention modules whose forward calls a function `f(q, k, cos, sin)` that computes ops.rope.

The function lives in the model's source file and serves every model of that architecture, so it is not replaced
there: this module's class gets a copy of its forward that sees another function under that name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import ops
from llmkern.swap.derive import derive, mentioned_globals, rebind
from llmkern.swap.found import Found, agrees

KIND = "rope"

_HEAD_DIM = 8


def find(module: nn.Module) -> Found | None:
    forward = type(module).forward
    for name, function in _rotary_functions(forward).items():
        if _computes_rope(function):
            cls = derive(type(module), rebind(forward, name, _replacement(function)))
            return Found("rope", "rope", cls=cls, sample=partial(_sample, getattr(module, "head_dim", _HEAD_DIM)))
        return Found("rope", "rope", f"{name} is not the rotary embedding that llmkern knows")
    return None


@cache
def _rotary_functions(forward: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {
        name: value
        for name, value in mentioned_globals(forward).items()
        if callable(value) and not isinstance(value, type) and ("rotary" in name or "rope" in name)
    }


@cache
def _computes_rope(function: Callable[..., Any]) -> bool:
    """Whether it agrees with ops.rope for full and partial rotary dimensions, in every form that it accepts."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 3, _HEAD_DIM, generator=generator)
    k = torch.randn(2, 2, 3, _HEAD_DIM, generator=generator)
    accepted = 0
    for width in (_HEAD_DIM, _HEAD_DIM // 2):
        half = torch.randn(2, 3, width // 2, generator=generator)
        angles = torch.cat((half, half), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        try:
            with torch.no_grad():
                rotated = function(q, k, cos, sin)
        except Exception:  # foreign code: a width that it does not take
            continue
        accepted += 1
        for got, want in zip(rotated, ops.rope(q, k, cos, sin), strict=True):
            if not agrees(got, want):
                return False
    return accepted > 0


@cache
def _replacement(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # Anything but the plain call (another unsqueeze_dim, position_ids, mixed dtypes) is the original's business.
        if args or kwargs or cos.dim() != 3 or q.dtype != k.dtype:
            return function(q, k, cos, sin, *args, **kwargs)
        return ops.rope(q, k, cos, sin)

    return apply_rotary_pos_emb


def _sample(head_dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    q = torch.zeros(1, 1, 1, head_dim, dtype=dtype, device=device)
    return {"q": q, "k": q, "cos": q[0], "sin": q[0]}
