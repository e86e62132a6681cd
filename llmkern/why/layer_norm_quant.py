from __future__ import annotations

from llmkern.why._norm import norm as build

__all__ = ["build"]
