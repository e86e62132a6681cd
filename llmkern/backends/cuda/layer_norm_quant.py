from __future__ import annotations

from llmkern.backends.cpu._rows import DTYPES, refuse_norm
from llmkern.backends.cuda import CUDA, _plan
from llmkern.dispatch import implements
from llmkern.library import native

implements("layer_norm_quant", CUDA, dtypes=DTYPES, min_capability=(8, 0), refuse=refuse_norm, describe=_plan.norm)(
    native("layer_norm_quant")
)
