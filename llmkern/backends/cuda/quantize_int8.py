from __future__ import annotations

from llmkern.backends.cuda import _plan
from llmkern.backends.cuda._declare import refuse_rows, serves

serves("quantize_int8", refuse=refuse_rows, describe=_plan.quantize)
