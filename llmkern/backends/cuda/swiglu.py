from __future__ import annotations

from llmkern.backends.cpu._rows import refuse_strided
from llmkern.backends.cuda import _plan
from llmkern.backends.cuda._declare import serves

serves("swiglu", refuse=refuse_strided, describe=_plan.activate("gate"), has_backward=True)
serves("swiglu_backward", refuse=refuse_strided)
