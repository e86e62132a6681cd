from __future__ import annotations

from llmkern.backends.cpu._rows import refuse_strided
from llmkern.backends.cuda import _plan
from llmkern.backends.cuda._declare import serves

serves("quantize_int8", refuse=refuse_strided, describe=_plan.quantize)
