"""Sweeps of each op; `llmkern/bench/sweep.py` describes the fields of a definition."""
