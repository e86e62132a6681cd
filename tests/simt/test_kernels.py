"""The CUDA kernels, executed by the SIMT machine: each op's shared cases, and shapes that choose every variant."""

from __future__ import annotations

import pytest

from llmkern import dispatch
from llmkern.testing.case import Call, Case, cases
from llmkern.testing.judge import assert_right

SEEDS = (0, 1)
CUDA = {
    op: implementation
    for op in dispatch.ops()
    for implementation in dispatch.implementations(op)
    if implementation.backend.name == "cuda"
}


def refusal(case: Case, call: Call) -> str | None:
    implementation = CUDA[case.op]
    if implementation.dtypes is not None and case.dtype not in implementation.dtypes:
        return f"takes no {case.dtype}"
    return implementation.refuse(**call) if implementation.refuse is not None else None


@pytest.mark.parametrize("case", [case for op in CUDA for case in cases(op)], ids=lambda case: f"{case.op}-{case}")
def test_cases(operators, case: Case) -> None:
    call = case.make()
    if reason := refusal(case, call):
        pytest.skip(reason)
    for seed in SEEDS:
        operators.set(seed=seed, late_copies=seed % 2 == 1)
        assert_right(case, call, operators.call(case.op, call))
