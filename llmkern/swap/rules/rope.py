"""Rotary embedding: attention modules whose forward calls a function `f(q, k, cos, sin)` that computes ops.rope.

The function lives in the model's source file and serves every model of that architecture, so it is not replaced
there: the module's forward sees another function under that name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import dispatch, ops
from llmkern.swap.derive import mentioned_globals
from llmkern.swap.edit import Edit
from llmkern.swap.match import Match, agrees
from llmkern.swap.observe import Sources

SWITCHES = ("rope",)

_HEAD_DIM = 8


@dataclass(frozen=True)
class _Form:
    """Form of a rotation: how dimensions are paired, and whether cos has one value per pair or per dimension."""

    interleaved: bool
    per_pair: bool


def find(module: nn.Module) -> Match | None:
    forward = type(module).forward
    for name, function in _rotary_functions(forward).items():
        form = _form(function)
        if form is None:
            return Match("rope", "", f"{name} is not the rotary embedding of ops.rope")
        edit = Edit("rope", rebinds=((name, _replacement(function, form)),))
        return Match("rope", "rope", edit=edit, sample=partial(_sample, form))
    return None


def _rotary_functions(forward: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {
        name: value
        for name, value in mentioned_globals(forward).items()
        if callable(value) and not isinstance(value, type) and ("rotary" in name or "rope" in name)
    }


@cache
def _form(function: Callable[..., Any]) -> _Form | None:
    """The form in which ops.rope computes what the function does, for whichever widths of cos it accepts."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 3, _HEAD_DIM, generator=generator)
    k = torch.randn(2, 2, 3, _HEAD_DIM, generator=generator)
    seen = []
    for width in (_HEAD_DIM, _HEAD_DIM // 2):
        cos, sin = torch.randn(2, 2, 3, width, generator=generator)
        try:
            with torch.no_grad(), Sources() as sources:
                seen.append(((q, k, cos, sin), function(q, k, cos, sin)))
        except Exception:  # foreign code, and a width that it does not take
            continue
        if sources.reason:
            return None
    for form in (_Form(False, False), _Form(True, False), _Form(False, True), _Form(True, True)):
        if seen and all(_same(form, *call_and_result) for call_and_result in seen):
            return form
    return None


def _same(form: _Form, call: tuple[Tensor, ...], result: Any) -> bool:
    cos = call[2]
    if form.per_pair and 2 * cos.shape[-1] > _HEAD_DIM or not isinstance(result, tuple) or len(result) != 2:
        return False
    rotary_dim = 2 * cos.shape[-1] if form.per_pair else None
    with torch.no_grad():
        expected = ops.rope(*call, interleaved=form.interleaved, rotary_dim=rotary_dim)
    return all(agrees(got, want) for got, want in zip(result, expected, strict=True))


@cache
def _replacement(function: Callable[..., Any], form: _Form) -> Callable[..., Any]:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # Anything but the plain call (another unsqueeze_dim, mixed dtypes) is the original's business.
        if args or kwargs or cos.dim() != 3 or cos.dtype != q.dtype or q.dtype != k.dtype:
            reason = "the model calls its rotary embedding with other arguments or dtypes than ops.rope takes"
            dispatch.record_fallback("rope", function.__module__, reason, {"q": q, "k": k})
            return function(q, k, cos, sin, *args, **kwargs)
        rotary_dim = 2 * cos.shape[-1] if form.per_pair else None
        return ops.rope(q, k, cos, sin, interleaved=form.interleaved, rotary_dim=rotary_dim)

    return apply_rotary_pos_emb


def _sample(form: _Form, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    q = torch.zeros(1, 1, 1, _HEAD_DIM, dtype=dtype, device=device)
    return {"q": q, "k": q, "cos": q[0], "sin": q[0], "rotary_dim": _HEAD_DIM, "interleaved": form.interleaved}
