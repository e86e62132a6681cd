from __future__ import annotations

from typing import Any

from llmkern import jax as twins
from llmkern.backends.tpu._declare import serves


@serves("swiglu_quant")
def swiglu_quant(gate: Any, up: Any) -> Any:
    return twins.swiglu_quant(gate, up)
