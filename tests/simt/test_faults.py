"""The SIMT machine judges: it finds every fault that planted.py plants, and none in the kernels as they are."""

from __future__ import annotations

import pytest
from faults import CUDA, FAULTS
from planted import BEGIN, CALLS, END, PAGE, TABLE, Verdict, clean, judge, row, summary


@pytest.mark.parametrize("name", CALLS)
def test_no_false_alarm(operators, name: str) -> None:
    clean(operators, name)


@pytest.mark.parametrize("number", range(1, len(FAULTS) + 1), ids=lambda n: f"{n}-{FAULTS[n - 1].kind}")
def test_a_planted_fault_is_found(operators, number: int) -> None:
    """Under every order and every arrival of copies, and as the committed table says."""
    verdict = judge(operators, number)
    assert verdict.caught, f"missed: {FAULTS[number - 1]}"
    assert row(FAULTS[number - 1], verdict) in TABLE.read_text(), "run tests/simt/planted.py"


def test_each_barrier_warp_and_wait_of_the_kernels_is_dropped_once() -> None:
    """Whoever adds one adds the fault that shows what it is for."""
    words = ("__syncthreads();", "__syncwarp();", "cp_async_wait_group<")
    for path in sorted(CUDA.rglob("*.cu*")):
        file = str(path.relative_to(CUDA))
        if file in ("common/ptx.cuh",):
            continue
        text = path.read_text()
        found = {text[:at].count("\n") + 1 for word in words for at in range(len(text)) if text.startswith(word, at)}
        assert found == {f.line for f in FAULTS if f.file == file and f.kind in ("wait", "barrier", "__syncwarp")}


def test_the_tables_show_every_fault() -> None:
    assert BEGIN + summary([Verdict(1, 1)] * len(FAULTS)) + END in PAGE.read_text(), "run tests/simt/planted.py"
    assert TABLE.read_text().count(" → ") == len(FAULTS)
