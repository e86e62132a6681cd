"""What every op and every implementation owes, over the op's cases: accuracy, opcheck, gradients, compile, export."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmkern import dispatch
from llmkern.testing.case import Case, cases, ops_with_cases
from llmkern.testing.compare import assert_as_accurate, upcast

OPS = ops_with_cases()
ALL_CASES = [case for op in OPS for case in cases(op)]
CASES_WITH_GRADIENT = [case for case in ALL_CASES if case.differentiable]


def case_id(case: Case) -> str:
    return f"{case.op}-{case}"


def implementation_pairs() -> list:
    return [
        pytest.param(case, impl, id=f"{case_id(case)}-{impl.backend.name}")
        for case in ALL_CASES
        for impl in dispatch.implementations(case.op)
        if impl.backend.name != "torch"  # the baseline itself
    ]


def run_or_skip(impl: dispatch.Implementation, call: dict):
    if reason := impl.why_not(**call):
        pytest.skip(reason)  # the dispatcher's own words
    return impl.fn(**call)


def baseline(case: Case, call: dict):
    """PyTorch's operator where it can express the call, else the reference in the case's own precision."""
    for name in ("torch", "reference"):
        for impl in dispatch.implementations(case.op):
            if impl.backend.name == name and impl.why_not(**call) is None:
                return impl.fn(**call)
    raise AssertionError(f"no baseline for {case_id(case)}")


def reference(case: Case):
    return dispatch.implementation(case.op, "reference").fn


def snapshot(call: dict) -> dict:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in call.items()}


@pytest.mark.parametrize(("case", "impl"), implementation_pairs())
def test_as_accurate_as_pytorch(case: Case, impl: dispatch.Implementation) -> None:
    call = case.make(device="cpu")
    before = snapshot(call)
    out = run_or_skip(impl, call)
    assert_as_accurate(out, baseline=baseline(case, call), exact=reference(case)(**upcast(call)))
    for name, value in before.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(call[name], value, rtol=0, atol=0, equal_nan=True)


def has_nan(call: dict) -> bool:
    return any(isinstance(v, Tensor) and bool(v.isnan().any()) for v in call.values())


@pytest.mark.parametrize("case", [c for c in ALL_CASES if c.dtype == torch.float32], ids=case_id)
def test_opcheck(case: Case) -> None:
    if has_nan(case.make()):
        pytest.skip("opcheck compares outputs with equal_nan=False")
    operator = getattr(torch.ops.llmkern, case.op).default
    call = case.make()
    torch.library.opcheck(operator, (), call)
    if case.differentiable:
        torch.library.opcheck(operator, (), require_grad(case, call))


def require_grad(case: Case, call: dict) -> dict:
    return {
        k: v.detach().clone().requires_grad_() if k in case.differentiable and isinstance(v, Tensor) else v
        for k, v in call.items()
    }


@pytest.mark.parametrize("case", CASES_WITH_GRADIENT, ids=case_id)
def test_gradients_match_autograd_of_the_reference_in_float64(case: Case) -> None:
    """The operator's backward formula against autograd through the reference's forward."""
    call = upcast(case.make())
    ours, theirs = require_grad(case, call), require_grad(case, call)
    out = getattr(torch.ops.llmkern, case.op)(**ours)
    expected = reference(case)(**theirs)
    outs = [o for o in ([out] if isinstance(out, Tensor) else out) if o.requires_grad]
    wants = [o for o in ([expected] if isinstance(expected, Tensor) else expected) if o.requires_grad]
    gradients = [
        torch.randn(o.shape, generator=torch.Generator().manual_seed(i), dtype=o.dtype) for i, o in enumerate(outs)
    ]
    torch.autograd.backward(outs, gradients)
    torch.autograd.backward(wants, gradients)
    for name in case.differentiable:
        if isinstance(call[name], Tensor):
            torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-9, atol=1e-9)
