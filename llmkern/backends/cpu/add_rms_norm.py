from __future__ import annotations

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_norm
from llmkern.dispatch import implements
from llmkern.library import native

implements("add_rms_norm", CPU, dtypes=DTYPES, refuse=refuse_norm, has_backward=True, rows_alone="always")(
    native("add_rms_norm")
)
