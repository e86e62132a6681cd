from __future__ import annotations

import pytest
import torch

from llmkern import registry
from llmkern.bench.ceilings import Ceilings
from llmkern.bench.schema import Result, Row
from llmkern.bench.sweep import Point, Sweep


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch) -> None:
    """Triton's interpreter, which these runs may have for other tests, is no contender."""
    probe = registry._missing
    monkeypatch.setattr(registry, "_missing", lambda name: "not here" if name == "triton" else probe(name))


@pytest.fixture
def ceilings() -> Ceilings:
    return Ceilings(1e10, 2e10, {"float32": 1e11, "int8": 1e12})


@pytest.fixture
def point() -> Point:
    """rms_norm of 8 rows, 64 wide, in fp32 on the CPU."""
    sweep = Sweep("8 rows", ("hidden",), (64,), {"rows": 8}, modes=("forward", "backward"), check={"rows": 2})
    return Point("rms_norm", sweep, 64, torch.float32, "forward", torch.device("cpu"))


def op_row(provider: str, p50: float, *, spread: float = 0.1, hidden: int = 64) -> Row:
    x = {"sweep": "8 rows", "x": "hidden", "dtype": "float32", "mode": "forward", "rows": 8, "hidden": hidden}
    low, high = p50 * (1 - spread), p50 * (1 + spread)
    detail = {"gb_per_s": 1e3 / p50, "tflop_per_s": 0.0, "operations": 0, "bytes": 4096, "n": 9}
    return Row(
        "ops", "rms_norm", provider, "time_us", x, low, p50, high, 0.5, {"error": 1e-7, "baseline": 2e-7}, detail
    )


@pytest.fixture
def result() -> Result:
    environment = {
        "device": "A CPU",
        "timestamp": "2026-01-02T03:04:05+00:00",
        "threads": 2,
        "git_commit": "abc",
        "interrupted": False,
        "absent_peers": {"liger": "Liger-Kernel needs a GPU"},
        "left_out": [],
    }
    rows = [op_row("llmkern", 10.0), op_row("torch", 30.0), op_row("llmkern", 20.0, hidden=128)]
    rows.append(op_row("broken", 1.0))
    rows[-1].p20 = rows[-1].p50 = rows[-1].p80 = rows[-1].speed_of_light = None
    rows[-1].error = "not timed, the result is wrong: error 3"
    return Result("llmkern bench ops", environment, rows)
