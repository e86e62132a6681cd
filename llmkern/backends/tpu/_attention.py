"""What the two attentions share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.ops.attention import in_token_order, lse_like


def as_outputs(found: Any, q: Tensor, return_lse: bool, **_: Any) -> tuple[Tensor, Tensor]:
    """(out in the memory order of its tokens, lse), as the ops return them."""
    out, lse = found if return_lse else (found, lse_like(q, False))
    return in_token_order(out), lse
