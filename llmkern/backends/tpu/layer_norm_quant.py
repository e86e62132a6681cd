from __future__ import annotations

from typing import Any

from llmkern import jax as twins
from llmkern.backends.tpu._declare import serves


@serves("layer_norm_quant")
def layer_norm_quant(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return twins.layer_norm_quant(x, weight, bias, eps)
