from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._layer import refuse_linears, refuse_vectors
from llmkern.backends.cpu._rows import DTYPES
from llmkern.dispatch import implements
from llmkern.library import native


def _refuse(hidden: Tensor, head_dim: int, mask: Tensor | None, **call: Any) -> str | None:
    names = ("cos", "sin", "input_norm", "post_norm", "q_norm", "k_norm")
    for name in ("k_cache", "v_cache"):
        if call[name] is not None and call[name].stride(-1) != 1:
            return f"the vectors of {name} have stride {call[name].stride(-1)}; only 1 is taken"
    return refuse_vectors(head_dim, mask, {name: call[name] for name in names}) or refuse_linears(
        ("q", "k", "v", "o", "gate", "up", "down"), hidden, call
    )


implements("decoder_layer_", CPU, dtypes=DTYPES, refuse=_refuse, rows_alone="on request")(native("decoder_layer_"))
