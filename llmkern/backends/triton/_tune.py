"""`llmkern tune OP`: time every candidate configuration on this device, and keep the fastest of each class."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llmkern import dispatch
from llmkern.backends.triton import _configs
from llmkern.backends.triton._configs import Config
from llmkern.backends.triton._launch import Target

__all__ = ["Tuned", "candidates", "representative", "tune"]

Timer = Callable[[Callable[[], Any]], float]
"""Takes a call, returns its time."""


@dataclass(frozen=True)
class Tuned:
    """One class: what the table had, what is fastest, and both times in the timer's unit (inf: it does not run)."""

    shape_class: str
    before: Config
    best: Config
    before_time: float
    best_time: float


def candidates(op: str) -> list[Config]:
    """Configurations worth a try; those that do not fit a device fail when launched, and are passed over."""
    _configs.classes(op)
    if op == "int8_matmul":
        return [
            {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8, "num_warps": warps, "num_stages": stages}
            for m, n, k, warps, stages in itertools.product(
                (16, 32, 64, 128), (32, 64, 128, 256), (32, 64, 128, 256), (4, 8), (2, 3, 4)
            )
            if m * n <= 128 * 256 and (m + n) * k * stages <= 200_000
        ]
    if op == "rope":
        return [
            {"ROWS": rows, "num_warps": warps, "num_stages": 1}
            for rows, warps in itertools.product((2, 4, 8, 16, 32), (1, 2, 4, 8))
        ]
    if op == "attention_decode":
        return [
            {"BLOCK_N": n, "num_warps": warps, "num_stages": stages}
            for n, warps, stages in itertools.product((16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4))
        ]
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
        for m, n, warps, stages in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3))
    ]


def representative(op: str, shape_class: str, device: torch.device | str) -> tuple[str, dict[str, Any]]:
    """(op to call, its arguments): a call of the class, of the size that models have."""
    kind, _, size = shape_class.partition("-")
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    if op == "rope":
        angles = torch.zeros(1, 4096, 128, device=device)
        q, k = (torch.zeros(1, heads, 4096, 128, dtype=torch.bfloat16, device=device) for heads in (32, 8))
        return op, {"q": q, "k": k, "cos": angles, "sin": angles, "rotary_dim": 128, "interleaved": False}
    if op == "int8_matmul":
        rows = {"16": 1, "64": 64}.get(size, 4096)
        x = torch.zeros(rows, 4096, dtype=dtype, device=device)
        w_q = torch.zeros(4096, 4096, dtype=torch.int8, device=device)
        w_scale = torch.ones(4096, 1, device=device)
        if kind != "s8":
            linear = {"x": x, "w_q": w_q, "w_scale": w_scale, "bias": None, "activation": "none", "scheme": "w8a16"}
            return "int8_linear", linear
        call: dict[str, Any] = {
            "a_q": x.to(torch.int8),
            "w_q": w_q,
            "a_scale": torch.ones(rows, 1, device=device),
            "w_scale": w_scale,
        }
        return op, call | {"bias": None, "residual": None, "activation": "none", "out_dtype": torch.bfloat16}
    dim = int(size)
    common = {"sinks": None, "sm_scale": dim**-0.5, "window": [-1, -1], "softcap": 0.0}
    if op == "attention_decode":
        cache = torch.zeros(8, 8, 8192, dim, dtype=dtype, device=device)
        lengths = torch.full((8,), 8192, dtype=torch.int32, device=device)
        nothing = {"block_table": None, "k_scale": None, "v_scale": None, "return_lse": False}
        q = torch.zeros(8, 32, 1, dim, dtype=dtype, device=device)
        return op, {"q": q, "k_cache": cache, "v_cache": cache, "seq_lens": lengths} | common | nothing
    q, k = (torch.zeros(4, heads, 4096, dim, dtype=dtype, device=device) for heads in (16, 4))
    call = {"q": q, "k": k, "v": k, "attn_mask": None, "key_padding_mask": None, "causal": True} | common
    if op == "attention":
        return op, call | {"return_lse": False}
    lse = torch.zeros(q.shape[:3], device=device)
    return op, call | {"dout": q, "dlse": lse, "out": q, "lse": lse, "mask_grad": False}


def tune(op: str, target: Target, device: torch.device | str, timer: Timer) -> Iterator[Tuned]:
    """Each class of `op` in turn; the table on disk is written after each."""
    path = _configs.tuned_path(target)
    for shape_class in _configs.classes(op):
        called, call = representative(op, shape_class, device)
        launcher = dispatch.implementation(called, "triton").fn
        before = _configs.config(op, shape_class, target)

        def time(chosen: Config) -> float:
            with _configs.override(op, shape_class, target, chosen):  # noqa: B023  (called within the iteration)
                try:
                    return timer(lambda: launcher(**call))  # noqa: B023
                except Exception as error:
                    if _is_too_large(error):
                        return float("inf")
                    raise

        before_time = time(before)
        times = [(time(chosen), chosen) for chosen in candidates(op)]
        best_time, best = min([(before_time, before), *times], key=lambda entry: entry[0])
        table = json.loads(path.read_text()) if path.is_file() else {}
        table.setdefault(op, {})[shape_class] = best
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table, indent=2) + "\n")
        yield Tuned(shape_class, before, best, before_time, best_time)
    _configs.forget()


def _is_too_large(error: Exception) -> bool:
    """Return True if a configuration needs more than the device, or the compiler, has."""
    return type(error).__name__ in ("OutOfResources", "PTXASError", "CompilationError", "OutOfMemoryError")
