"""What tests, benchmarks and `llmkern check` share: the accuracy rule and each op's cases."""
