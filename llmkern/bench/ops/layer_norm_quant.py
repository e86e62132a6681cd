from __future__ import annotations

from llmkern.bench.ops._norm import norm_sweeps

SWEEPS = norm_sweeps("forward")
