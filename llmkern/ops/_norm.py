"""What the normalisations share: the gradients' fakes."""

from __future__ import annotations

from torch import Tensor


def fake_gradients(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Empty (dx, dweight, dbias); a parameter that is None has a gradient of 0 elements."""
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if weight is None else weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )
