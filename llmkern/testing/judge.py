"""Is this the right result of this case?  The one entry for tests of every backend, on every device.

Three rules, chosen by `Case.rule`:
- "accuracy": every output keeps the accuracy rule (llmkern.testing.compare).
- "bits": every output has the bits of the reference run in the case's own dtype.
- "codes": the first two outputs are int8 codes and their scale, computed from a floating value, so codes next to
  a tie may go either way.  The scale and any further output keep the accuracy rule, and what the codes stand for,
  q·scale, is within half a step of the exact value plus the error that the accuracy rule allows an fp32 value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern import dispatch
from llmkern.testing.case import Call, Case
from llmkern.testing.compare import as_list, assert_as_accurate, assert_same_bits, cast, errors, upcast

__all__ = ["assert_right", "baseline", "reference"]

# Rounding the scale, its inverse and their products with the value: three roundings, half an ulp each.
QUANTIZATION_ROUNDING = 1.5 * torch.finfo(torch.float32).eps


def reference(case: Case, call: Call) -> Any:
    """What the reference backend computes from `call`, in the call's own dtype."""
    return dispatch.implementation(case.op, "reference").fn(**call)


def baseline(case: Case, call: Call) -> Any:
    """PyTorch's operator where it can express the call, else the reference in the case's own precision."""
    for name in ("torch", "reference"):
        for impl in dispatch.implementations(case.op):
            if impl.backend.name == name and impl.why_not(**call) is None:
                return impl.fn(**call)
    raise AssertionError(f"no baseline for {case.op}-{case}")


def assert_right(case: Case, call: Call, out: Any) -> None:
    """Raise AssertionError, with the numbers, unless `out` is a right result of `case`, which was run on `call`."""
    for i, (ours, expected) in enumerate(zip(as_list(out), as_list(reference(case, call)), strict=True)):
        assert ours.dtype == expected.dtype, f"output {i} is {ours.dtype}, expected {expected.dtype}"
    if case.rule == "bits":
        assert_same_bits(out, reference(case, call))
    elif case.rule == "accuracy":
        assert_as_accurate(out, baseline=baseline(case, call), exact=reference(case, upcast(call)))
    else:
        _assert_codes(case, call, as_list(out))


def _assert_codes(case: Case, call: Call, out: list[Tensor]) -> None:
    assert case.value is not None, "a case judged by its codes says what value they stand for"
    names = ["scale", *[f"output {i}" for i in range(2, len(out))]]
    base, exact = as_list(baseline(case, call)), as_list(reference(case, upcast(call)))
    assert_as_accurate(out[1:], baseline=base[1:], exact=exact[1:], names=names)

    codes, scale = out[0], out[1].double()
    value = case.value(upcast(call)).double()
    in_fp32 = case.value(cast(call, torch.float32)).float()
    (error,) = errors(in_fp32, in_fp32, value)
    magnitude = value.abs().amax(-1, keepdim=True) if value.numel() else value
    allowed = scale / 2 + QUANTIZATION_ROUNDING * magnitude + error.allowed
    gap = (codes.double() * scale - value).abs()
    wrong = ~((gap <= allowed) | ((codes.double() * scale).isnan() & value.isnan()))
    if bool(wrong.any()):
        worst = (gap - allowed).nan_to_num(nan=float("inf")).argmax()
        raise AssertionError(
            f"{int(wrong.sum())} of {codes.numel()} codes are wrong; at flat index {int(worst)} the code stands for "
            f"{float((codes.double() * scale).flatten()[worst]):.9g}, exact is {float(value.flatten()[worst]):.9g}, "
            f"a distance of {float(allowed.expand_as(gap).flatten()[worst]):.3g} is allowed"
        )
