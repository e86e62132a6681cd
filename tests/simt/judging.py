"""Running an op's cases on the SIMT machine."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from machine import Operators

from llmkern import dispatch
from llmkern.testing.case import Call, Case
from llmkern.testing.compare import assert_same_bits
from llmkern.testing.judge import assert_right

SEEDS = (0, 1)
CUDA = {
    op: implementation
    for op in dispatch.ops()
    for implementation in dispatch.implementations(op)
    if implementation.backend.name == "cuda" and not op.endswith("_backward")
}


def refusal(case: Case, call: Call) -> str | None:
    implementation = CUDA[case.op]
    if implementation.dtypes is not None and case.dtype not in implementation.dtypes:
        return f"takes no {case.dtype}"
    return implementation.refuse(**call) if implementation.refuse is not None else None


def judge(operators: Operators, case: Case, *, seeds: Sequence[int] = SEEDS, **settings: int) -> None:
    """The result is right, and has the same bits under every seed; with odd ones asynchronous copies land late."""
    call = case.make()
    if reason := refusal(case, call):
        pytest.skip(reason)
    first = None
    for seed in seeds:
        operators.set(seed=seed, late_copies=seed % 2 == 1, **settings)
        out = operators.op(case.op, call)
        if first is None:
            assert_right(case, call, out)
            first = out
        else:
            assert_same_bits(out, first)
