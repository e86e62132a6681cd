"""Shared by tests, benchmarks and `llmkern check`: the accuracy rule and each op's cases."""
