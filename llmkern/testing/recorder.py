"""A recorder for `llmkern.dispatch.recording` that keeps the dispatched calls and forbids falling back."""

from __future__ import annotations

from llmkern.dispatch import Implementation
from llmkern.testing.case import Call

__all__ = ["Recorder"]


class Recorder:
    """Keeps every call with the backend that served it; a fallback is an AssertionError with its reason."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Call]] = []
        self.backends: list[str] = []

    def served(self, op: str, call: Call, implementation: Implementation, start: float) -> None:
        """Keep the call."""
        self.calls.append((op, call))
        self.backends.append(implementation.backend.name)

    def fell_back(self, op: str, call: Call, to: str, reason: str) -> None:
        """Fail the test."""
        raise AssertionError(f"{op} fell back to {to}: {reason}")
