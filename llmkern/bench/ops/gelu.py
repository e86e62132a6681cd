from __future__ import annotations

from llmkern.bench.ops._elementwise import elementwise_sweeps

SWEEPS = elementwise_sweeps("forward", "backward", hidden=12800, quick_hidden=3072)
