from __future__ import annotations

from typing import Any

import torch

from llmkern import jax as twins
from llmkern.backends.tpu._declare import serves


@serves("int8_matmul", dtypes=(torch.int8,))
def int8_matmul(
    a_q: Any,
    w_q: Any,
    a_scale: Any,
    w_scale: Any,
    bias: Any,
    residual: Any,
    activation: str,
    out_dtype: torch.dtype,
) -> Any:
    return twins.int8_matmul(
        a_q,
        w_q,
        a_scale,
        w_scale,
        bias=bias,
        residual=residual,
        activation=activation,
        out_dtype=str(out_dtype).removeprefix("torch."),
    )
