from __future__ import annotations

from typing import Any

from llmkern import jax as twins
from llmkern.backends.tpu._declare import serves


@serves("quantize_int8")
def quantize_int8(x: Any) -> Any:
    return twins.quantize_int8(x)
