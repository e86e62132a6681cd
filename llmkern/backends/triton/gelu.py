from __future__ import annotations

from torch import Tensor

from llmkern.backends.triton._declare import serves
from llmkern.backends.triton._elementwise import launch_elementwise


@serves("gelu", has_backward=True)
def gelu(x: Tensor, approximate: str) -> Tensor:
    from llmkern.backends.triton._kernels.gelu import gelu_kernel

    out = x.new_empty(x.shape)
    launch_elementwise(gelu_kernel, (x,), (out,), APPROXIMATE=approximate)
    return out


@serves("gelu_backward")
def gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    from llmkern.backends.triton._kernels.gelu import gelu_backward_kernel

    dx = x.new_empty(x.shape)
    launch_elementwise(gelu_backward_kernel, (dy, x), (dx,), APPROXIMATE=approximate)
    return dx
