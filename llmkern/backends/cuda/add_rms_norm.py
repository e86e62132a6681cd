from __future__ import annotations

from llmkern.backends.cuda._declare import serves_norm

serves_norm("add_rms_norm", has_backward=True)
