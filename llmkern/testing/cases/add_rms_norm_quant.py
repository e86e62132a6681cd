from __future__ import annotations

from llmkern.testing.case import Call
from llmkern.testing.cases._norm import FUSED_SIZES, norm_cases


def _norm_of_the_rounded_sum(call: Call) -> tuple[str, Call]:
    norm = {name: value for name, value in call.items() if name != "residual"}
    return "rms_norm", norm | {"x": call["x"] + call["residual"]}


CASES = norm_cases(
    "add_rms_norm_quant",
    optional=("residual", "weight_offset"),
    sizes=FUSED_SIZES,
    rule="codes",
    value=_norm_of_the_rounded_sum,
)
