from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkern.bench.stats import beyond_noise, percentile, ratios, summary


def test_percentiles_between_neighbours() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([10.0, 20.0], 0.2) == pytest.approx(12.0)
    assert summary([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]).to_dict() == {"p20": 2.0, "p50": 3.5, "p80": 5.0}


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=50))
def test_a_summary_is_ordered_and_within_the_samples(samples: list[float]) -> None:
    found = summary(samples)
    assert min(samples) <= found.p20 <= found.p50 <= found.p80 <= max(samples)
    assert found.n == len(samples)


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summary([])


def test_ratios_are_taken_round_by_round() -> None:
    """Another process makes some rounds ten times as slow: the ratio of medians would be 20 or 0.2, the truth is 2."""
    disturbed = [1.0, 1.0, 10.0, 10.0, 10.0]
    assert ratios(disturbed, [2 * t for t in disturbed]).to_dict() == {"p20": 2.0, "p50": 2.0, "p80": 2.0}


def test_ratios_of_unequal_lengths_take_the_rounds_of_both() -> None:
    assert ratios([1.0, 2.0], [3.0, 6.0, 100.0]).n == 2


def test_beyond_noise_needs_ranges_that_do_not_touch() -> None:
    assert beyond_noise((1.0, 2.0), (2.1, 3.0))
    assert beyond_noise((2.1, 3.0), (1.0, 2.0))
    assert not beyond_noise((1.0, 2.0), (2.0, 3.0))
