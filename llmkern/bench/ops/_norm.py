"""The sweeps that all normalisations share: rows × hidden, of about as many elements at every hidden size."""

from __future__ import annotations

from llmkern.bench.sweep import Mode, Sweep

__all__ = ["HIDDEN", "norm_sweeps"]

HIDDEN = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


def norm_sweeps(*modes: Mode) -> tuple[Sweep, ...]:
    """A prefill's rows at every hidden size, and one model's hidden size from a single token on."""
    check = {"rows": 64}
    return (
        Sweep("2048 rows", ("hidden",), HIDDEN, {"rows": 2048}, modes=modes, quick=(576,), check=check),
        Sweep("hidden 4096", ("rows",), (1, 4, 16, 64, 256, 1024, 8192), {"hidden": 4096}, quick=(1,), check=check),
    )
