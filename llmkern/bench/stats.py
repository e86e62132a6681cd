"""Numbers of repeated measurements.  Medians and percentiles: a busy machine's outliers are all on one side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Summary", "beyond_noise", "percentile", "ratios", "summary"]


@dataclass(frozen=True)
class Summary:
    """Percentiles of n samples."""

    p20: float
    p50: float
    p80: float
    n: int

    def to_dict(self) -> dict[str, float]:
        return {"p20": self.p20, "p50": self.p50, "p80": self.p80}


def percentile(samples: Sequence[float], q: float) -> float:
    """The value below which a share q of the samples lies, interpolated linearly between neighbours."""
    if not samples:
        raise ValueError("percentile: there are no samples")
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summary(samples: Sequence[float]) -> Summary:
    return Summary(percentile(samples, 0.2), percentile(samples, 0.5), percentile(samples, 0.8), len(samples))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Summary:
    """theirs / ours, round by round: what slows a whole round, such as another process, cancels out.

    A side that ended early (it failed, say) has fewer rounds; those that both have are compared.
    """
    return summary([b / a for a, b in zip(ours, theirs, strict=False)])


def beyond_noise(old: tuple[float, float], new: tuple[float, float]) -> bool:
    """Return True if the ranges from the 20th to the 80th percentile do not touch."""
    return new[0] > old[1] or new[1] < old[0]
