from __future__ import annotations

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_strided
from llmkern.dispatch import implements
from llmkern.library import native

implements("swiglu_quant", CPU, dtypes=DTYPES, refuse=refuse_strided, rows_alone="always")(native("swiglu_quant"))
