"""One file per peer; `llmkern/bench/peer.py` says what it holds."""
