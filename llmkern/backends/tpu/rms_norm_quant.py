from __future__ import annotations

from typing import Any

from llmkern import jax as twins
from llmkern.backends.tpu._declare import serves


@serves("rms_norm_quant")
def rms_norm_quant(x: Any, weight: Any, bias: Any, eps: float, weight_offset: float) -> Any:
    return twins.rms_norm_quant(x, weight, eps, weight_offset=weight_offset, bias=bias)
