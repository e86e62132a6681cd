from __future__ import annotations

from llmkern.bench.ops._elementwise import elementwise_sweeps

SWEEPS = elementwise_sweeps("forward")
