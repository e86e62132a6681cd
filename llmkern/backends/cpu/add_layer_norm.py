from __future__ import annotations

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_norm
from llmkern.backends.cpu._speed import MeasuredSizes
from llmkern.dispatch import implements
from llmkern.library import native

implements(
    "add_layer_norm",
    CPU,
    dtypes=DTYPES,
    refuse=refuse_norm,
    slower=MeasuredSizes("add_layer_norm", "x"),
    has_backward=True,
    rows_alone="always",
)(native("add_layer_norm"))
