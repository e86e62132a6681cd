from __future__ import annotations

from llmkern.why.linear_kl_div import build

__all__ = ["build"]
