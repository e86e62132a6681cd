from __future__ import annotations

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_strided
from llmkern.backends.cpu._speed import MeasuredSizes
from llmkern.dispatch import implements
from llmkern.library import native

implements(
    "swiglu",
    CPU,
    dtypes=DTYPES,
    refuse=refuse_strided,
    slower=MeasuredSizes("swiglu", "gate"),
    has_backward=True,
    rows_alone="always",
)(native("swiglu"))
implements("swiglu_backward", CPU, dtypes=DTYPES, refuse=refuse_strided, rows_alone="always")(native("swiglu_backward"))
