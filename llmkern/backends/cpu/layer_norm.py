from __future__ import annotations

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_norm, refuse_norm_backward
from llmkern.backends.cpu._speed import MeasuredSizes
from llmkern.dispatch import implements
from llmkern.library import native

implements(
    "layer_norm",
    CPU,
    dtypes=DTYPES,
    refuse=refuse_norm,
    slower=MeasuredSizes("layer_norm", "x"),
    has_backward=True,
    rows_alone="always",
)(native("layer_norm"))
implements("layer_norm_backward", CPU, dtypes=DTYPES, refuse=refuse_norm_backward)(native("layer_norm_backward"))
