from __future__ import annotations

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_norm, refuse_norm_backward
from llmkern.dispatch import implements
from llmkern.library import native

implements("rms_norm", CPU, dtypes=DTYPES, refuse=refuse_norm, has_backward=True, rows_alone="always")(
    native("rms_norm")
)
implements("rms_norm_backward", CPU, dtypes=DTYPES, refuse=refuse_norm_backward)(native("rms_norm_backward"))
