"""What is swept for each op: `llmkern/bench/sweep.py` says what a definition holds."""
