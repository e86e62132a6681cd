from __future__ import annotations

from llmkern.backends.cuda._declare import serves_norm

serves_norm("layer_norm_quant")
