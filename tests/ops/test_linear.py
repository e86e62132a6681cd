"""linear beyond the contract: bad input."""

from __future__ import annotations

import pytest
import torch

from llmkern import ops


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "linear: x is torch.int8, expected", {"x": torch.zeros(2, 8, dtype=torch.int8)}),
        (
            TypeError,
            "weight is torch.bfloat16, expected torch.float32",
            {"weight": torch.ones(6, 8).bfloat16()},
        ),
        (TypeError, "linear: bias is torch.float64, expected torch.float32", {"bias": torch.zeros(6).double()}),
        (ValueError, r"linear: x has no dimensions, expected \[..., hidden\]", {"x": torch.zeros(())}),
        (ValueError, r"linear: weight has 3 dimensions, expected \[N, K\]", {"weight": torch.zeros(1, 6, 8)}),
        (ValueError, r"linear: weight has K = 7, expected 8", {"weight": torch.zeros(6, 7)}),
        (ValueError, r"linear: bias has shape \[5\], expected \[6\]", {"bias": torch.zeros(5)}),
        (ValueError, "linear: activation is 'tanh', expected 'none' or", {"activation": "tanh"}),
        (ValueError, "linear: weight is on meta, expected cpu", {"weight": torch.zeros(6, 8, device="meta")}),
    ],
)
def test_bad_input(error, message, change) -> None:
    with pytest.raises(error, match=message):
        ops.linear(**({"x": torch.zeros(2, 8), "weight": torch.zeros(6, 8)} | change))
