from __future__ import annotations

from typing import Any

from llmkern import jax as twins
from llmkern.backends.tpu._declare import serves


@serves("swiglu")
def swiglu(gate: Any, up: Any) -> Any:
    return twins.swiglu(gate, up)
