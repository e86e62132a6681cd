"""The device's best rates: bandwidth of a copy and of a read, and one large matmul for each dtype."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from llmkern.bench.timers import clock_for

__all__ = ["Ceilings", "ceilings"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
# Bytes of a buffer, and the side of the matrices.  On the CPU as many bytes as the sets of inputs that an op is
# timed on have together (run_ops.py): beyond the caches of a core, not beyond one that a whole server shares.
_SIZES = {"cpu": (2**26, 2048), "cuda": (2**31, 8192)}
_ROUNDS = 7


@dataclass(frozen=True)
class Ceilings:
    """bytes_per_s: the better of copy (bytes read and written) and read.  ops_per_s: of a matmul, by dtype."""

    copy_bytes_per_s: float
    read_bytes_per_s: float
    ops_per_s: dict[str, float]

    @property
    def bytes_per_s(self) -> float:
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    def seconds(self, moved: float, operations: float, dtype: str) -> float:
        """The least time in which the device could move so many bytes and do so many operations, overlapped."""
        rate = self.ops_per_s.get(dtype)
        return max(moved / self.bytes_per_s, operations / rate if rate else 0.0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "copy_gb_per_s": round(self.copy_bytes_per_s / 1e9, 2),
            "read_gb_per_s": round(self.read_bytes_per_s / 1e9, 2),
            "matmul_tflop_per_s": {name: round(rate / 1e12, 4) for name, rate in self.ops_per_s.items()},
        }


def ceilings(device: torch.device) -> Ceilings:
    """Measure: the median of 7 each, after one to warm up; about two seconds."""
    size, side = _SIZES[device.type]
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy, read = _rate(device, partial(target.copy_, source), 2 * size), _rate(device, source.sum, size)
    del source, target
    rates = {}
    for name, dtype in _DTYPES.items():
        product = _matmul(device, dtype, side)
        if product is not None:
            rates[name] = _rate(device, product, 2 * side**3)
    return Ceilings(copy, read, rates)


def _matmul(device: torch.device, dtype: torch.dtype, side: int) -> Callable[[], Any] | None:
    """Return a product of two square matrices, or None if the device lacks or emulates this dtype."""
    if dtype == torch.int8:
        a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in "ab")
        product: Callable[[], Any] = lambda: torch._int_mm(a, b.t())  # noqa: E731
    else:
        x, y = (torch.ones(side, side, dtype=dtype, device=device) for _ in "xy")
        product = lambda: x @ y.t()  # noqa: E731
    try:
        start = time.perf_counter()
        product()
        slow = device.type == "cpu" and time.perf_counter() - start > 2.0
    except RuntimeError:
        return None
    return None if slow else product


def _rate(device: torch.device, function: Callable[[], Any], amount: float) -> float:
    clock = clock_for(device)
    clock.calls([function])
    samples = sorted(clock.sample([function], 1) for _ in range(_ROUNDS))
    return amount / samples[_ROUNDS // 2]
