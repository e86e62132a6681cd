"""Sweeps of ops that read one element, or one row, at a time."""

from __future__ import annotations

from llmkern.bench.sweep import Mode, Sweep

__all__ = ["elementwise_sweeps"]


def elementwise_sweeps(*modes: Mode, hidden: int = 14336, quick_hidden: int = 1536) -> tuple[Sweep, ...]:
    """hidden: of a large model (Llama-3-8B's MLP); quick_hidden: of a small one (SmolLM2-135M's)."""
    check = {"rows": 64}
    rows = (1, 16, 64, 256, 1024, 4096, 16384)
    return (
        Sweep(f"hidden {hidden}", ("rows",), rows, {"hidden": hidden}, modes=modes, check=check),
        Sweep(
            f"hidden {quick_hidden}",
            ("rows",),
            (1, 8, 64, 512, 4096),
            {"hidden": quick_hidden},
            modes=modes,
            quick=(1, 512),
            check=check,
        ),
    )
