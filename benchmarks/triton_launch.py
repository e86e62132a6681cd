"""Python time per call of the Triton backend above Triton's own launcher, at batch 1; no GPU is needed.

Triton's launcher is replaced by a function that does nothing, so that what is timed is all that llmkern adds: the
public function, dispatch, views, allocation of the outputs (the CPU's allocator stands for the GPU's), the choice of
the configuration, the grid.  The minimum of many short repetitions is printed, in µs for each launch, and goes to
benchmarks/results/ with what it was measured on.

    python benchmarks/triton_launch.py
"""

from __future__ import annotations

import json
import os
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The dispatcher lets Triton have CPU tensors where its interpreter would run them; nothing is run here.
os.environ["TRITON_INTERPRET"] = "1"

import torch

from llmkern import dispatch, ops
from llmkern.backends.triton._launch import assume
from llmkern.bench.environment import device_name, environment, slug
from llmkern.bench.readme import paths
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


def measured() -> list[dict[str, Any]]:
    """For each call its launches and the µs of Python for each; calls take turns, so that all meet the same load."""
    rows = []
    with torch.no_grad(), dispatch.use_backend("triton"), assume(TARGETS["sm90"], note):
        for name, call in calls().items():
            launched.clear()
            call()
            rows.append({"op": name, "launches": len(launched), "us_per_launch": float("inf")})
        timers = [timeit.Timer(call) for call in calls().values()]
        for _ in range(REPETITIONS):
            for row, timer in zip(rows, timers, strict=True):
                each = timer.timeit(CALLS) / CALLS / row["launches"] * 1e6
                row["us_per_launch"] = min(row["us_per_launch"], round(each, 2))
            launched.clear()
    return rows


def main() -> None:
    """Print one line for each op, and write the result file."""
    device = torch.device("cpu")
    rows = measured()
    for row in rows:
        over = "" if row["us_per_launch"] < LIMIT else f"  over {LIMIT:.0f} µs"
        print(f"{row['op']:20} {row['launches']} x {row['us_per_launch']:5.1f} µs{over}")
    path, _ = paths(Path(__file__).parent, slug(device_name(device)), "triton_launch")
    path.parent.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/triton_launch.py"
    result = {"command": command, "environment": environment(device), "limit_us": LIMIT, "launches": rows}
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
