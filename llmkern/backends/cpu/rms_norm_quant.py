from __future__ import annotations

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_norm
from llmkern.dispatch import implements
from llmkern.library import native

implements("rms_norm_quant", CPU, dtypes=DTYPES, refuse=refuse_norm, rows_alone="always")(native("rms_norm_quant"))
