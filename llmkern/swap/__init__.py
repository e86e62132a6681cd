"""Swapping llmkern into a model instance, and out again."""

from __future__ import annotations

from llmkern.swap.optimize import optimize_, patched, restore_
from llmkern.swap.report import SwapReport, SwapRow

__all__ = ["SwapReport", "SwapRow", "optimize_", "patched", "restore_"]
