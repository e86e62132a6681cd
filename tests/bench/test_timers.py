"""The control flow of measuring, with a clock that costs nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from llmkern.bench import timers
from llmkern.bench.timers import CpuClock, Thunk, measure


class FakeClock:
    """The thunks return how long they take; time goes by as they are called."""

    def __init__(self, *, graphs: bool = False) -> None:
        self.time, self.graphs, self.order = 0.0, graphs, []

    def now(self) -> float:
        return self.time

    def calls(self, thunks: Sequence[Thunk]) -> int:
        return 1

    def sample(self, thunks: Sequence[Thunk], calls: int) -> float:
        seconds = thunks[0]()
        self.order.append(seconds)
        self.time += seconds
        return seconds

    def graph(self, thunks: Sequence[Thunk]) -> Thunk | None:
        seconds = thunks[0]()
        return (lambda: seconds * timers.CALLS_IN_GRAPH / 2) if self.graphs else None


def test_contenders_take_turns() -> None:
    clock = FakeClock()
    found = measure({"a": [lambda: 1.0], "b": [lambda: 3.0]}, clock, seconds=10.0, now=clock.now)
    assert clock.order == [1.0, 3.0] * 5
    assert found["a"].call == [1.0] * 5
    assert found["b"].call == [3.0] * 5


def test_a_slow_contender_gets_five_rounds_and_a_fast_one_at_most_a_hundred() -> None:
    clock = FakeClock()
    assert len(measure({"slow": [lambda: 100.0]}, clock, seconds=1.0, now=clock.now)["slow"].call) == 5
    clock = FakeClock()
    assert len(measure({"fast": [lambda: 1e-3]}, clock, seconds=1.0, now=clock.now)["fast"].call) == 100


def test_who_fails_leaves_and_the_others_go_on() -> None:
    times = itertools.chain([1.0, 1.0], itertools.repeat(None))

    def fails() -> float:
        seconds = next(times)
        if seconds is None:
            raise RuntimeError("out of\nmemory")
        return seconds

    clock = FakeClock()
    found = measure({"fails": [fails], "goes on": [lambda: 2.0]}, clock, seconds=1.0, now=clock.now)
    assert found["fails"].error == "RuntimeError: out of memory"
    assert len(found["goes on"].call) == 5
    assert found["goes on"].error is None


def test_only_calls_under_20_us_are_replayed_in_a_graph() -> None:
    clock = FakeClock(graphs=True)
    found = measure({"short": [lambda: 10e-6], "long": [lambda: 30e-6]}, clock, seconds=1e-9, now=clock.now)
    assert found["short"].kernel == pytest.approx([5e-6] * 5)
    assert found["long"].kernel == []


def test_the_cpu_clock_walks_through_its_inputs() -> None:
    seen: list[int] = []
    thunks = [lambda i=i: seen.append(i) for i in range(3)]
    clock = CpuClock()
    assert clock.sample(thunks, 4) > 0
    clock.sample(thunks, 2)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_the_cpu_clock_fills_a_millisecond_with_short_calls() -> None:
    assert CpuClock().calls([lambda: None]) > 10
