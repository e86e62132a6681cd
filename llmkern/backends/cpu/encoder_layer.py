from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._layer import refuse_linears, refuse_vectors
from llmkern.backends.cpu._rows import DTYPES
from llmkern.dispatch import implements
from llmkern.library import native


def _refuse(hidden: Tensor, heads: int, mask: Tensor | None, **call: Any) -> str | None:
    names = ("attention_norm", "attention_norm_bias", "output_norm", "output_norm_bias")
    head_dim = call["q_weight"].shape[0] // heads
    return refuse_vectors(head_dim, mask, {name: call[name] for name in names}) or refuse_linears(
        ("q", "k", "v", "o", "up", "down"), hidden, call
    )


implements("encoder_layer", CPU, dtypes=DTYPES, refuse=_refuse, rows_alone="on request")(native("encoder_layer"))
