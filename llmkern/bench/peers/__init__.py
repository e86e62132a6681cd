"""Peers, one file each; `llmkern/bench/peer.py` says what it holds."""
