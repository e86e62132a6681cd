"""The launcher that elementwise kernels share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.backends.triton._launch import Kernel, as_rows, launch, next_power_of_2

BLOCK = 1024


def launch_elementwise(
    kernel: Kernel, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], **constants: Any
) -> None:
    """`kernel(*inputs, *outputs, hidden, *strides of the inputs' rows)` on tensors of one shape; outputs contiguous."""
    if outputs[0].numel() == 0:
        return
    if all([x.is_contiguous() for x in inputs]):
        rows, hidden = 1, outputs[0].numel()
        strides = [0] * len(inputs)
    else:
        hidden = outputs[0].shape[-1]
        rows = outputs[0].numel() // hidden
        pairs = [as_rows(x) for x in inputs]
        inputs, strides = tuple([x for x, _ in pairs]), [stride for _, stride in pairs]
    block = min(next_power_of_2(hidden), BLOCK)
    programs = rows * -(-hidden // block)
    launch(kernel, (programs, 1, 1), *inputs, *outputs, hidden, *strides, BLOCK=block, num_warps=4, **constants)
