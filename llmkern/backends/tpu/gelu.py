from __future__ import annotations

from typing import Any

from llmkern import jax as twins
from llmkern.backends.tpu._declare import serves


@serves("gelu")
def gelu(x: Any, approximate: str) -> Any:
    return twins.gelu(x, approximate)
