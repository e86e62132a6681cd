"""Clocks: how long one call takes, on the CPU and on a GPU; and the loop that asks several contenders in turn.

CPU: a sample is the mean of as many calls as fill a millisecond.  GPU: events around one call, after the L2 cache has
been overwritten; and for calls of under 20 µs a CUDA graph of many calls besides, because what Python and the launch
cost is then most of the call: both times are reported.
Contenders take turns, A B A B …, so that what disturbs the machine meets all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

__all__ = ["Clock", "CpuClock", "CudaClock", "Timed", "clock_for", "measure"]

Thunk = Callable[[], Any]
SAMPLE_SECONDS = 1e-3
GRAPH_BELOW_SECONDS = 20e-6
CALLS_IN_GRAPH = 20
MIN_ROUNDS, MAX_ROUNDS = 5, 100


class Clock(Protocol):
    """Measures seconds per call.  `thunks` do the same on different inputs, so that none is in a cache."""

    def calls(self, thunks: Sequence[Thunk]) -> int:
        """Return how many calls make a sample; runs the thunks to find out, which warms them up too."""

    def sample(self, thunks: Sequence[Thunk], calls: int) -> float: ...

    def graph(self, thunks: Sequence[Thunk]) -> Thunk | None:
        """Return one replay of many calls, to be sampled in place of single ones, or None."""


class CpuClock:
    """Wall time."""

    def __init__(self) -> None:
        self._next = 0

    def calls(self, thunks: Sequence[Thunk]) -> int:
        for thunk in thunks:
            thunk()
        return max(1, min(1000, round(SAMPLE_SECONDS / max(self.sample(thunks, 1), 1e-9))))

    def sample(self, thunks: Sequence[Thunk], calls: int) -> float:
        first, count = self._next, len(thunks)
        self._next = (first + calls) % count
        start = time.perf_counter()
        for i in range(first, first + calls):
            thunks[i % count]()
        return (time.perf_counter() - start) / calls

    def graph(self, thunks: Sequence[Thunk]) -> Thunk | None:
        return None


class CudaClock:
    """Events on the current stream."""

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * size, dtype=torch.int8, device=device)

    def calls(self, thunks: Sequence[Thunk]) -> int:
        for thunk in thunks:
            thunk()
        torch.cuda.synchronize()
        return 1

    def sample(self, thunks: Sequence[Thunk], calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        self._flush.zero_()
        start.record()
        for i in range(calls):
            thunks[i % len(thunks)]()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls

    def graph(self, thunks: Sequence[Thunk]) -> Thunk | None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(CALLS_IN_GRAPH):
                thunks[i % len(thunks)]()
        graph.replay()
        return graph.replay


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass
class Timed:
    """Seconds per call, one entry per round; `kernel` those of the graph; `error` ended it."""

    call: list[float] = field(default_factory=list)
    kernel: list[float] = field(default_factory=list)
    error: str | None = None


def measure(
    contenders: Mapping[str, Sequence[Thunk]],
    clock: Clock,
    *,
    seconds: float,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Timed]:
    """Sample the contenders in turn until `seconds` for each of them are over, at least 5 rounds and at most 100.

    A contender that raises keeps the error and leaves; the others go on.
    """
    found = {name: Timed() for name in contenders}
    calls = {name: _guard(found[name], clock.calls, contenders[name]) for name in contenders}
    _rounds(found, seconds, now, {n: (contenders[n], c) for n, c in calls.items() if c is not None}, clock, "call")
    replays: dict[str, tuple[Sequence[Thunk], int]] = {}
    for name, timed in found.items():
        if timed.error is None and min(timed.call) < GRAPH_BELOW_SECONDS:
            replay = _guard(Timed(), clock.graph, contenders[name])  # what cannot be captured has its call time
            if replay is not None:
                replays[name] = ([replay], 1)
    _rounds(found, seconds, now, replays, clock, "kernel")
    for timed in found.values():
        timed.kernel = [sample / CALLS_IN_GRAPH for sample in timed.kernel]
    return found


def _rounds(
    found: dict[str, Timed],
    seconds: float,
    now: Callable[[], float],
    running: dict[str, tuple[Sequence[Thunk], int]],
    clock: Clock,
    into: str,
) -> None:
    start, budget, done = now(), seconds * len(running), 0
    while running and done < MAX_ROUNDS and (done < MIN_ROUNDS or now() - start < budget):
        for name, (thunks, calls) in list(running.items()):
            sample = _guard(found[name], clock.sample, thunks, calls)
            if sample is None:
                del running[name]
            else:
                getattr(found[name], into).append(sample)
        done += 1


def _guard(timed: Timed, function: Callable[..., Any], *arguments: Any) -> Any:
    """The result, or None with the error kept."""
    try:
        return function(*arguments)
    except Exception as error:
        timed.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return None
