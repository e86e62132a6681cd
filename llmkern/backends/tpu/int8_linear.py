from __future__ import annotations

from typing import Any

from llmkern import jax as twins
from llmkern.backends.tpu._declare import serves


@serves("int8_linear")
def int8_linear(x: Any, w_q: Any, w_scale: Any, bias: Any, activation: str, scheme: str) -> Any:
    return twins.int8_linear(x, w_q, w_scale, bias, activation=activation, scheme=scheme)
