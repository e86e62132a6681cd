from __future__ import annotations

import math

import torch
from torch import Tensor

from llmkern.backends.reference import REFERENCE, accumulate
from llmkern.dispatch import implements

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
CUBIC = 0.044715


def _distribution(xf: Tensor, approximate: str) -> Tensor:
    """Φ(x); through erfc and not 1 + erf, which cancels for negative x."""
    if approximate == "none":
        return 0.5 * torch.erfc(xf * -math.sqrt(0.5))
    return 0.5 * (1 + torch.tanh(SQRT_2_OVER_PI * (xf + CUBIC * xf**3)))


@implements("gelu", REFERENCE, has_backward=True)
def gelu(x: Tensor, approximate: str) -> Tensor:
    xf = accumulate(x)
    return (xf * _distribution(xf, approximate)).to(x.dtype).contiguous()


@implements("gelu_backward", REFERENCE, has_backward=True)
def gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    """dx = dy·(Φ(x) + x·Φ'(x)); for tanh, with t = 2Φ − 1: Φ' = ½·(1 − t²)·√(2/π)·(1 + 3·0.044715·x²)."""
    xf = accumulate(x)
    phi = _distribution(xf, approximate)
    if approximate == "none":
        density = torch.exp(-0.5 * xf.square()) / math.sqrt(2 * math.pi)
    else:
        # ½·(1 − t²) = 2·Φ·(1 − Φ)
        density = 2 * phi * (1 - phi) * SQRT_2_OVER_PI * (1 + 3 * CUBIC * xf.square())
    return (accumulate(dy) * (phi + xf * density)).to(x.dtype).contiguous()
