from __future__ import annotations

from typing import Any

from llmkern import jax as twins
from llmkern.backends.tpu._declare import serves


@serves("layer_norm")
def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return twins.layer_norm(x, weight, bias, eps)
