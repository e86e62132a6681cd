from __future__ import annotations

from llmkern.backends.cpu._rows import DTYPES, refuse_strided
from llmkern.backends.cuda import CUDA, _plan
from llmkern.dispatch import implements
from llmkern.library import native

implements(
    "swiglu_quant",
    CUDA,
    dtypes=DTYPES,
    min_capability=(8, 0),
    refuse=refuse_strided,
    describe=_plan.quantized_activation,
)(native("swiglu_quant"))
