"""Two results against each other: ratios, and which of them are beyond the noise of both runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmkern.bench.schema import Result, Row, lower_is_better
from llmkern.bench.stats import beyond_noise
from llmkern.bench.tables import number
from llmkern.table import render

__all__ = ["Comparison", "Pair", "compare"]


@dataclass(frozen=True)
class Pair:
    """A row that both results have.  ratio: how many times as good the new one is.  verdict: better, worse or ""."""

    old: Row
    new: Row
    ratio: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """pairs: what both measured.  lost, gained: rows that one of them lacks.  differences: of the environments."""

    pairs: tuple[Pair, ...]
    lost: tuple[Row, ...]
    gained: tuple[Row, ...]
    differences: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "differences": list(self.differences),
            "pairs": [
                {
                    "suite": pair.new.suite,
                    "name": pair.new.name,
                    "provider": pair.new.provider,
                    "metric": pair.new.metric,
                    "x": pair.new.x,
                    "old": pair.old.p50,
                    "new": pair.new.p50,
                    "ratio": pair.ratio,
                    "verdict": pair.verdict,
                }
                for pair in self.pairs
            ],
            "lost": [row.to_dict() for row in self.lost],
            "gained": [row.to_dict() for row in self.gained],
        }

    def __str__(self) -> str:
        rows = [
            (*_place(pair.new), number(pair.old.p50), number(pair.new.p50), f"{pair.ratio:.3f}×", pair.verdict)
            for pair in self.pairs
        ]
        headers = ("what", "provider", "metric", "old", "new", "as good", "beyond noise")
        parts = [*self.differences, render("new against old", headers, rows)]
        parts += [f"only in old: {' '.join(_place(row))}" for row in self.lost]
        parts += [f"only in new: {' '.join(_place(row))}" for row in self.gained]
        counts = {word: sum(pair.verdict == word for pair in self.pairs) for word in ("better", "worse")}
        within = len(self.pairs) - sum(counts.values())
        parts.append(f"{counts['better']} better, {counts['worse']} worse, {within} within the noise")
        return "\n".join(parts)


def _place(row: Row) -> tuple[str, str, str]:
    sizes = " ".join(f"{name}={value}" for name, value in row.x.items() if name not in ("sweep", "x"))
    return f"{row.name} {sizes}", row.provider, row.metric


def compare(old: Result, new: Result) -> Comparison:
    """Beyond noise: the ranges from the 20th to the 80th percentile of the two runs do not touch.

    A number without a spread (a perplexity, a peak of memory) is beyond it where it differs by more than 0.1%.
    """
    before = {row.key: row for row in old.rows if row.p50 is not None}
    after = {row.key: row for row in new.rows if row.p50 is not None}
    pairs = tuple(_pair(before[key], row) for key, row in after.items() if key in before)
    return Comparison(
        pairs,
        tuple(row for key, row in before.items() if key not in after),
        tuple(row for key, row in after.items() if key not in before),
        tuple(
            f"{name}: {old.environment.get(name)} → {new.environment.get(name)}"
            for name in ("device", "threads", "git_commit")
            if old.environment.get(name) != new.environment.get(name)
        ),
    )


def _pair(old: Row, new: Row) -> Pair:
    assert old.p50 is not None
    assert new.p50 is not None
    lower = lower_is_better(new.metric)
    better, worse = (old.p50, new.p50) if lower else (new.p50, old.p50)
    ratio = better / worse if worse else 1.0
    apart = beyond_noise(_range(old), _range(new))
    return Pair(old, new, ratio, ("better" if ratio > 1 else "worse") if apart else "")


def _range(row: Row) -> tuple[float, float]:
    assert row.p50 is not None
    if row.p20 is None or row.p80 is None or row.p20 == row.p80:
        return row.p50 * 0.9995, row.p50 * 1.0005
    return row.p20, row.p80
