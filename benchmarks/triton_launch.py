"""Python time per call of the Triton backend above Triton's own launcher, at batch 1; no GPU is needed.

Triton's launcher is replaced by a function that does nothing, so that what is timed is all that llmkern adds: the
public function, dispatch, views, allocation of the outputs (the CPU's allocator stands for the GPU's), the choice of
the configuration, the grid.  The minimum of many short repetitions is printed, in µs for each launch.

    python benchmarks/triton_launch.py
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any

import torch

from llmkern import dispatch, ops
from llmkern.backends.triton._launch import assume
from llmkern.testing.triton_offline import TARGETS

LIMIT = 15.0
REPETITIONS, CALLS = 300, 20


def calls() -> dict[str, Callable[[], Any]]:
    """One decode step's ops on a model of hidden size 4096, by public name; batch 1."""
    half = torch.bfloat16
    x, hidden = torch.zeros(1, 1, 4096, dtype=half), torch.zeros(1, 1, 14336, dtype=half)
    weight = torch.ones(4096, dtype=half)
    w_q, w_scale = torch.zeros(4096, 4096, dtype=torch.int8), torch.ones(4096, 1)
    q, k = torch.zeros(1, 32, 1, 128, dtype=half), torch.zeros(1, 8, 1, 128, dtype=half)
    angles = torch.zeros(1, 1, 128, dtype=half)
    cache, lengths = torch.zeros(1, 8, 1024, 128, dtype=half), torch.full((1,), 1024, dtype=torch.int32)
    a_q, a_scale = torch.zeros(1, 1, 4096, dtype=torch.int8), torch.ones(1, 1, 1)
    return {
        "rms_norm": lambda: ops.rms_norm(x, weight),
        "add_rms_norm": lambda: ops.add_rms_norm(x, x, weight),
        "add_rms_norm_quant": lambda: ops.add_rms_norm_quant(x, x, weight),
        "quantize_int8": lambda: ops.quantize_int8(x),
        "int8_matmul": lambda: ops.int8_matmul(a_q, w_q, a_scale, w_scale, out_dtype=half),
        "int8_linear w8a16": lambda: ops.int8_linear(x, w_q, w_scale, scheme="w8a16"),
        "int8_linear w8a8": lambda: ops.int8_linear(x, w_q, w_scale, scheme="w8a8"),
        "swiglu": lambda: ops.swiglu(hidden, hidden),
        "gelu": lambda: ops.gelu(hidden),
        "rope": lambda: ops.rope(q, k, angles, angles),
        "attention_decode": lambda: ops.attention_decode(q, cache, cache, lengths),
        "attention": lambda: ops.attention(q, cache, cache),
    }


launched: list[Any] = []


def note(kernel: Any, *_: Any) -> None:
    """In place of Triton's launcher."""
    launched.append(kernel)


def main() -> None:
    """Print one line for each op."""
    with torch.no_grad(), dispatch.use_backend("triton"), assume(TARGETS["sm90"], note):
        for name, call in calls().items():
            launched.clear()
            call()
            launches = len(launched)
            each = min(timeit.repeat(call, number=CALLS, repeat=REPETITIONS)) / CALLS / launches * 1e6
            print(f"{name:20} {launches} x {each:5.1f} µs" + ("" if each < LIMIT else f"  over {LIMIT:.0f} µs"))


if __name__ == "__main__":
    main()
