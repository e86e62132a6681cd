from __future__ import annotations

from llmkern.backends.cuda._declare import serves_norm, serves_norm_backward

serves_norm("rms_norm", has_backward=True)
serves_norm_backward("rms_norm_backward")
