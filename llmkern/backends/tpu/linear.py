from __future__ import annotations

from typing import Any

from llmkern import jax as twins
from llmkern.backends.tpu._declare import serves


@serves("linear")
def linear(x: Any, weight: Any, bias: Any, activation: str) -> Any:
    return twins.linear(x, weight, bias, activation=activation)
