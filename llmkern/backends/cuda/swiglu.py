from __future__ import annotations

from llmkern.backends.cpu._rows import DTYPES, refuse_strided
from llmkern.backends.cuda import CUDA, _plan
from llmkern.dispatch import implements
from llmkern.library import native

implements(
    "swiglu",
    CUDA,
    dtypes=DTYPES,
    min_capability=(8, 0),
    has_backward=True,
    refuse=refuse_strided,
    describe=_plan.activate("gate"),
)(native("swiglu"))

implements("swiglu_backward", CUDA, dtypes=DTYPES, min_capability=(8, 0), refuse=refuse_strided)(
    native("swiglu_backward")
)
