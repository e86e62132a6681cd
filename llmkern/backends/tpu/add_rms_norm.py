from __future__ import annotations

from typing import Any

from llmkern import jax as twins
from llmkern.backends.tpu._declare import serves


@serves("add_rms_norm")
def add_rms_norm(x: Any, residual: Any, weight: Any, bias: Any, eps: float, weight_offset: float) -> Any:
    return twins.add_rms_norm(x, residual, weight, eps, weight_offset=weight_offset, bias=bias)
