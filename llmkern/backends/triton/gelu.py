from __future__ import annotations

from torch import Tensor

from llmkern.backends.triton._declare import serves
from llmkern.backends.triton._elementwise import launch_elementwise
from llmkern.backends.triton._launch import Kernel, contiguous_like

GELU_KERNEL = Kernel("gelu", "gelu_kernel")
GELU_BACKWARD_KERNEL = Kernel("gelu", "gelu_backward_kernel")


@serves("gelu", has_backward=True)
def gelu(x: Tensor, approximate: str) -> Tensor:
    out = contiguous_like(x)
    launch_elementwise(GELU_KERNEL, (x,), (out,), APPROXIMATE=approximate)
    return out


@serves("gelu_backward")
def gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    dx = contiguous_like(x)
    launch_elementwise(GELU_BACKWARD_KERNEL, (dy, x), (dx,), APPROXIMATE=approximate)
    return dx
