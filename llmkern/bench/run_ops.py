"""The ops suite: for every point each contender is judged, and those that are right are timed in turn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import llmkern.ops
from llmkern import dispatch
from llmkern.bench import stats
from llmkern.bench.accuracy import Judge, Wrong, weights_like
from llmkern.bench.ceilings import Ceilings
from llmkern.bench.environment import memory_of
from llmkern.bench.peer import Peer, Unsupported
from llmkern.bench.schema import Row
from llmkern.bench.sweep import Inputs, Point, Work, tensor_bytes
from llmkern.bench.timers import Clock, Thunk, Timed, measure
from llmkern.testing.compare import as_list

__all__ = ["Contender", "contenders", "run_point", "run_points"]

OURS = "llmkern"
BASELINE, XLA = "torch", "xla"
"""Baseline of the times by device: PyTorch's operators, on a TPU XLA's."""
# A set of inputs for each call, until together they are larger than the caches that are a core's own.
ROTATED_BYTES, MOST_SETS = 2**26, 16
# Points that even at the device's ceiling would take longer, or more of its memory, are left out.
LONGEST_SECONDS = {"cpu": 1.0, "cuda": 0.2}
LARGEST_SHARE_OF_MEMORY = 0.2


@dataclass(frozen=True)
class Contender:
    """Who takes part.  prepare: takes `Inputs`, returns the function to time; the rest as of `OpPeer`.

    as_tensors: makes tensors on the point's device of what that function returns, for the judge.
    """

    provider: str
    prepare: Callable[[Inputs], Thunk]
    approximate: str | None = None
    timed: bool = True
    note: str = ""
    as_tensors: Callable[[Any], Any] = lambda out: out

    def judged(self, inputs: Inputs) -> Thunk:
        """`prepare`, whose function returns tensors."""
        run = self.prepare(inputs)
        return lambda: self.as_tensors(run())


def contenders(point: Point, call: dict[str, Any], peers: Iterable[Peer]) -> list[Contender]:
    """llmkern as a user calls it, each further kernel backend that can serve the call, and the peers."""
    chosen = dispatch.select(point.op, call).backend.name
    found = [Contender(OURS, _public(point.op, None), note=f"served by {chosen}")]
    for impl in dispatch.implementations(point.op):
        if impl.backend.kernels and impl.backend.name != chosen and impl.why_not(**call) is None:
            timed = impl.priority >= 0  # below that are interpreters
            name = f"{OURS}:{impl.backend.name}"
            found.append(Contender(name, _public(point.op, impl.backend.name), timed=timed))
    for peer in peers:
        for way in peer.ops.get(point.op, ()):
            found.append(Contender(way.provider, _of_peer(way.prepare), way.approximate, way.timed()))
    return found


def _public(op: str, backend: str | None) -> Callable[[Inputs], Thunk]:
    """The public function, dispatch included; `backend` forced."""
    function = getattr(llmkern.ops, op)

    def prepare(inputs: Inputs) -> Thunk:
        arguments = inputs.arguments
        if backend is None:
            return lambda: function(**arguments)

        def run() -> Any:
            with dispatch.use_backend(backend):
                return function(**arguments)

        return run

    return prepare


def _of_peer(prepare: Callable[[dict[str, Any]], Thunk]) -> Callable[[Inputs], Thunk]:
    return lambda inputs: prepare(inputs.call)


def run_points(
    points: Sequence[Point],
    peers: Sequence[Peer],
    clock: Clock,
    ceilings: Ceilings,
    *,
    seconds: float,
    add: Callable[[list[Row]], None],
    left_out: Callable[[str], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
    chosen: Callable[..., list[Contender]] = contenders,
) -> None:
    """Every point's rows go to `add` as soon as they are there; what is too large for the device to `left_out`."""
    for done, point in enumerate(points):
        progress(done, len(points))
        reason = too_large(point, ceilings)
        if reason is not None:
            left_out(f"{point}: {reason}")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            add(run_point(point, peers, clock, ceilings, seconds=seconds, chosen=chosen))
        torch._dynamo.reset()  # else a limit on recompilations ends in eager code
    progress(len(points), len(points))


def too_large(point: Point, ceilings: Ceilings) -> str | None:
    """Why a point is not measured here, judged on tensors without memory."""
    inputs = point.inputs(ghosts=True)
    work = point.work(inputs.call, _outputs(point.op, inputs.call))
    floor = ceilings.seconds(work.moved, work.operations, work.dtype)
    longest = LONGEST_SECONDS[point.device.type]
    if floor > longest:
        return f"takes at least {floor:.2g} s on this device, at most {longest:g} s are measured"
    share = work.moved / memory_of(point.device)
    if share > LARGEST_SHARE_OF_MEMORY:
        return f"needs {share:.0%} of this device's memory, at most {LARGEST_SHARE_OF_MEMORY:.0%} are used"
    return None


def _outputs(op: str, call: dict[str, Any]) -> Any:
    """The op's outputs as its fake makes them: shapes and dtypes."""
    with torch.no_grad():
        return getattr(torch.ops.llmkern, op)(**call)


def run_point(
    point: Point,
    peers: Iterable[Peer],
    clock: Clock,
    ceilings: Ceilings,
    *,
    seconds: float,
    chosen: Callable[..., list[Contender]] = contenders,
) -> list[Row]:
    """Judge and time the contenders of one point; a row each, and one more for the time inside a CUDA graph."""
    judge = Judge(point)
    call = judge.full.call
    work = point.work(call, _outputs(point.op, call))
    rows: list[Row] = []
    thunks: dict[str, list[Thunk]] = {}
    for contender in chosen(point, call, peers):
        row = Row("ops", point.op, contender.provider, "time_us", point.x)
        if contender.note:
            row.detail["note"] = contender.note
        rows.append(row)
        try:
            row.accuracy = judge.check(contender.judged, contender.approximate)
            if contender.timed:
                thunks[contender.provider] = _rotated(point, judge, contender)
            else:
                row.error = "judged only: a time would mean nothing here"
        except Unsupported as error:
            row.error = f"not supported: {error}"
        except Wrong as error:
            row.error = f"not timed, the result is wrong: {error}"
        except Exception as error:
            row.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    with torch.set_grad_enabled(point.mode == "backward"):
        timed = measure(thunks, clock, seconds=seconds)
    return [out for row in rows for out in _timed_rows(row, timed, work, ceilings)]


def _rotated(point: Point, judge: Judge, contender: Contender) -> list[Thunk]:
    """The contender on several sets of inputs, each of which it packs for itself."""
    one = tensor_bytes(judge.full.call.values())
    count = max(1, min(MOST_SETS, ROTATED_BYTES // max(one, 1)))
    with torch.set_grad_enabled(point.mode == "backward"):
        sets = [judge.full, *[point.inputs(seed=seed) for seed in range(1, count)]]
        made = [contender.prepare(inputs) for inputs in sets]
        if point.mode == "forward":
            return made
        return [_backward(forward, inputs, point.leaves) for forward, inputs in zip(made, sets, strict=True)]


def _backward(forward: Thunk, inputs: Inputs, leaves: tuple[str, ...]) -> Thunk:
    """The gradients of a graph that is kept."""
    outputs = [out for out in as_list(forward()) if out.requires_grad]
    given = [inputs.call[name] for name in leaves if isinstance(inputs.call[name], torch.Tensor)]
    weights = [weights_like(out) for out in outputs]
    return lambda: torch.autograd.grad(outputs, given, weights, retain_graph=True)


def _timed_rows(row: Row, timed: dict[str, Timed], work: Work, ceilings: Ceilings) -> list[Row]:
    samples = timed.get(row.provider)
    if samples is None:
        return [row]
    if samples.error is not None:
        row.error = samples.error
        return [row]
    to = BASELINE if BASELINE in timed else XLA
    base = timed.get(to)
    rows = [row]
    _fill(row, samples.call, base.call if base is not None and base.error is None else [], to, work, ceilings)
    if samples.kernel:
        inside = Row("ops", row.name, row.provider, "kernel_us", row.x, accuracy=row.accuracy)
        _fill(inside, samples.kernel, base.kernel if base is not None else [], to, work, ceilings)
        rows.append(inside)
    return rows


def _fill(row: Row, seconds: list[float], base: list[float], to: str, work: Work, ceilings: Ceilings) -> None:
    """Percentiles in µs, the rates that the median makes of the work, and the ratio to the baseline `to`."""
    found = stats.summary(seconds)
    row.p20, row.p50, row.p80 = found.p20 * 1e6, found.p50 * 1e6, found.p80 * 1e6
    row.speed_of_light = ceilings.seconds(work.moved, work.operations, work.dtype) / found.p50
    row.detail |= {
        "n": found.n,
        "bytes": work.moved,
        "operations": work.operations,
        "gb_per_s": work.moved / found.p50 / 1e9,
        "tflop_per_s": work.operations / found.p50 / 1e12,
    }
    if base:
        row.detail["ratio"] = {"to": to} | stats.ratios(seconds, base).to_dict()
