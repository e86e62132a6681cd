from __future__ import annotations

from llmkern.backends.cpu._rows import DTYPES
from llmkern.backends.cpu.rope import refuse
from llmkern.backends.cuda import CUDA, _plan
from llmkern.dispatch import implements
from llmkern.library import native

implements("rope", CUDA, dtypes=DTYPES, min_capability=(8, 0), refuse=refuse, describe=_plan.rope)(native("rope"))
