from __future__ import annotations

from torch import Tensor

from llmkern.backends.triton._declare import serves
from llmkern.backends.triton._elementwise import launch_elementwise


@serves("swiglu", has_backward=True)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from llmkern.backends.triton._kernels.swiglu import swiglu_kernel

    out = gate.new_empty(gate.shape)
    launch_elementwise(swiglu_kernel, (gate, up), (out,))
    return out


@serves("swiglu_backward")
def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    from llmkern.backends.triton._kernels.swiglu import swiglu_backward_kernel

    dgate, dup = (x.new_empty(x.shape) for x in (gate, up))
    launch_elementwise(swiglu_backward_kernel, (dy, gate, up), (dgate, dup))
    return dgate, dup
