from __future__ import annotations

from typing import Any

from llmkern import jax as twins
from llmkern.backends.tpu._declare import serves


@serves("add_layer_norm")
def add_layer_norm(x: Any, residual: Any, weight: Any, bias: Any, eps: float) -> Any:
    return twins.add_layer_norm(x, residual, weight, bias, eps)
