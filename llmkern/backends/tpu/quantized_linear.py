from __future__ import annotations

from typing import Any

import torch

from llmkern import jax as twins
from llmkern.backends.tpu._declare import serves


@serves("quantized_linear", stored=(torch.float16, torch.uint8))
def quantized_linear(**call: Any) -> Any:
    return twins.quantized_linear(**call)
