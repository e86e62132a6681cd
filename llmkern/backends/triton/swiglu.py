from __future__ import annotations

from torch import Tensor

from llmkern.backends.triton._declare import serves
from llmkern.backends.triton._elementwise import launch_elementwise
from llmkern.backends.triton._launch import Kernel, contiguous_like

SWIGLU_KERNEL = Kernel("swiglu", "swiglu_kernel")
SWIGLU_BACKWARD_KERNEL = Kernel("swiglu", "swiglu_backward_kernel")


@serves("swiglu", has_backward=True)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = contiguous_like(gate)
    launch_elementwise(SWIGLU_KERNEL, (gate, up), (out,))
    return out


@serves("swiglu_backward")
def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = contiguous_like(gate), contiguous_like(up)
    launch_elementwise(SWIGLU_BACKWARD_KERNEL, (dy, gate, up), (dgate, dup))
    return dgate, dup
