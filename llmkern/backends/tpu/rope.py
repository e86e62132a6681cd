from __future__ import annotations

from typing import Any

from llmkern import jax as twins
from llmkern.backends.tpu._declare import serves


@serves("rope")
def rope(q: Any, k: Any, cos: Any, sin: Any, rotary_dim: int, interleaved: bool) -> Any:
    return twins.rope(q, k, cos, sin, rotary_dim=rotary_dim, interleaved=interleaved)
