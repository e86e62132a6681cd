from __future__ import annotations

from llmkern.backends.cpu._rows import DTYPES
from llmkern.backends.cpu.gelu import refuse
from llmkern.backends.cuda import CUDA, _plan
from llmkern.dispatch import implements
from llmkern.library import native

implements("gelu", CUDA, dtypes=DTYPES, min_capability=(8, 0), refuse=refuse, describe=_plan.activate("x"))(
    native("gelu")
)
