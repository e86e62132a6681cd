from __future__ import annotations

from llmkern.testing.case import Call
from llmkern.testing.cases._norm import FUSED_SIZES, norm_cases


def _norm(call: Call) -> tuple[str, Call]:
    return "rms_norm", call


CASES = norm_cases("rms_norm_quant", optional=("weight_offset",), sizes=FUSED_SIZES, rule="codes", value=_norm)
