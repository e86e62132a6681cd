from __future__ import annotations

from llmkern.why.swiglu import build

__all__ = ["build"]
