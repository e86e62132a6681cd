from __future__ import annotations

from llmkern.backends.cuda._declare import serves_norm, serves_norm_backward

serves_norm("layer_norm", has_backward=True)
serves_norm_backward("layer_norm_backward")
