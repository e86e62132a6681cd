"""Five tiny calls, of kernels with shared memory, barriers, asynchronous copies and tensor cores, for a sanitizer.

python tests/gpu/tiny_calls.py cuda
"""

from __future__ import annotations

import sys

import torch

from llmkern import dispatch
from llmkern.testing.case import cases

OPS = ("rms_norm_quant", "swiglu_quant", "int8_matmul", "attention", "attention_decode")


def run(device: str) -> list[str]:
    """The ops of which a kernel for this device, or else the reference, has served a call."""
    served = []
    backend = "cuda" if device == "cuda" else "reference"
    for op in OPS:
        implementation = dispatch.implementation(op, backend)
        for case in sorted(cases(op), key=lambda case: case.dtype != torch.bfloat16):
            call = case.make(device)
            lead = next(value for value in call.values() if isinstance(value, torch.Tensor))
            if lead.numel() and implementation.why_not(**call) is None:
                implementation.fn(**call)
                served.append(op)
                break
    if device == "cuda":
        torch.cuda.synchronize()
    return served


if __name__ == "__main__":
    left = set(OPS) - set(run(sys.argv[1]))
    sys.exit(f"not served: {', '.join(sorted(left))}" if left else 0)
