from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch

from llmkern.bench import accuracy, run_ops
from llmkern.bench.peer import Peer, Unsupported, need, peers, peers_named
from llmkern.bench.run_ops import Contender, contenders, run_point, run_points, too_large
from llmkern.bench.schema import Row
from llmkern.bench.sweep import Point, Sweep, definition, ops_with_sweeps, points
from llmkern.bench.timers import Thunk
from llmkern.testing.case import ops_with_cases
from llmkern.testing.judge import reference
from llmkern.why import sizes

CPU = torch.device("cpu")
WHOLE_LAYERS = {"layers_"}
"""`llmkern bench model` measures them, where there is a model around them to compare with."""
# Their public functions return less than their ops, which the judge of sweeps cannot compare yet.
LOSSES = {"cross_entropy", "linear_cross_entropy", "linear_jsd", "linear_kl_div"}


class Instant:
    """A clock for which every call takes 1 ms; the calls are made."""

    def calls(self, thunks: Sequence[Thunk]) -> int:
        return 1

    def sample(self, thunks: Sequence[Thunk], calls: int) -> float:
        thunks[0]()
        return 1e-3

    def graph(self, thunks: Sequence[Thunk]) -> Thunk | None:
        return None


def planted(wrong: float, *, approximate: str | None = None, ran: list[int] | None = None) -> Contender:
    """rms_norm with an error of `wrong`; `ran` counts its calls."""

    def prepare(inputs):
        def run():
            if ran is not None:
                ran.append(1)
            return reference("rms_norm", inputs.call) * (1 + wrong)

        return run

    return Contender("planted", prepare, approximate)


def rows_of(point: Point, ceilings, *who: Contender) -> list[Row]:
    return run_point(point, [], Instant(), ceilings, seconds=0.0, chosen=lambda *_: list(who))


def test_a_wrong_kernel_gets_no_time(point, ceilings) -> None:
    ran: list[int] = []
    (row,) = rows_of(point, ceilings, planted(1e-2, ran=ran))
    assert row.p50 is None
    assert row.error.startswith("not timed, the result is wrong: output 0: 512 of 512 elements")
    assert len(ran) == 1  # judged, never timed
    (row,) = rows_of(point, ceilings, planted(0.0))
    assert row.p50 == 1000.0
    assert row.error is None


def test_a_wrong_gradient_gets_no_time(point, ceilings) -> None:
    backward = dataclasses.replace(point, mode="backward")
    (row,) = rows_of(backward, ceilings, planted(1e-2))
    assert "the result is wrong" in row.error
    (row,) = rows_of(backward, ceilings, planted(0.0))
    assert row.p50 == 1000.0


def test_an_approximation_is_judged_by_its_distance_and_says_what_it_is(point, ceilings) -> None:
    (row,) = rows_of(point, ceilings, planted(1e-2, approximate="rounded to two digits"))
    assert row.p50 == 1000.0
    assert row.accuracy == {"relative_error": pytest.approx(1e-2, rel=1e-3), "approximate": "rounded to two digits"}
    (row,) = rows_of(point, ceilings, planted(0.2, approximate="one digit"))
    assert "relative error 0.2" in row.error


def test_what_is_wrong_at_full_size_only_is_found(point, ceilings, monkeypatch) -> None:
    """Judged at 2 of 8 rows, because 8 are too many: whoever spoils the others is caught all the same."""
    monkeypatch.setitem(accuracy.LARGEST, "cpu", (2e9, 300))

    def prepare(inputs):
        def run():
            out = reference("rms_norm", inputs.call)
            out[2:] *= 1.01
            return out

        return run

    (row,) = rows_of(point, ceilings, Contender("planted", prepare))
    assert "wrong: at full size" in row.error
    (row,) = rows_of(point, ceilings, planted(0.0))
    assert row.error is None
    assert row.accuracy["judged_at"] == {"rows": 2, "hidden": 64}


def test_a_crash_and_a_refusal_are_rows_and_the_rest_is_measured(point, ceilings) -> None:
    def crashes(inputs):
        raise RuntimeError("no kernel image")

    def refuses(inputs):
        raise Unsupported("takes float16")

    rows = rows_of(point, ceilings, Contender("a", crashes), Contender("b", refuses), planted(0.0))
    assert [row.error for row in rows] == ["RuntimeError: no kernel image", "not supported: takes float16", None]


def test_rates_follow_from_the_work_and_the_time(point, ceilings) -> None:
    (row,) = rows_of(point, ceilings, planted(0.0))
    moved = 4 * (8 * 64 + 64 + 8 * 64)
    assert row.detail["bytes"] == moved
    assert row.detail["gb_per_s"] == pytest.approx(moved / 1e-3 / 1e9)
    assert row.speed_of_light == pytest.approx(moved / 2e10 / 1e-3)


def test_work_of_a_causal_prefill_and_of_an_int8_product() -> None:
    sweep = Sweep("s", ("Sq", "Skv"), (16,), {"B": 2, "Hq": 4, "Hkv": 2, "D": 8}, {"causal": True})
    point = Point("attention", sweep, 16, torch.float32, "forward", CPU)
    inputs = point.inputs(ghosts=True)
    work = point.work(inputs.call, [])
    assert work.operations == 2 * 4 * (16 * 17 // 2) * 2 * (8 + 8)
    assert work.moved == 4 * (2 * 4 * 16 * 8 + 2 * 2 * 2 * 16 * 8)
    linear = Point("int8_linear", Sweep("s", ("M",), (64,), {"N": 32, "K": 16}), 64, torch.bfloat16, "forward", CPU)
    work = linear.work(linear.inputs(ghosts=True).call, [])
    assert (work.operations, work.dtype) == (2 * 64 * 32 * 16, "int8")
    assert work.moved == 64 * 16 * 2 + 32 * 16 + 32 * 4


def test_what_the_device_cannot_do_in_time_is_left_out_with_a_sentence(point, ceilings, monkeypatch) -> None:
    assert too_large(point, ceilings) is None
    monkeypatch.setitem(run_ops.LONGEST_SECONDS, "cpu", 1e-9)
    said: list[str] = []
    run_points([point], [], Instant(), ceilings, seconds=0.0, add=lambda rows: None, left_out=said.append)
    assert "rms_norm 8 rows hidden=64 float32 forward: takes at least" in said[0]


def test_rows_are_handed_over_point_by_point(point, ceilings) -> None:
    kept: list[Row] = []

    def interrupt(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_points(
            [point, point], [], Instant(), ceilings, seconds=0.0, add=kept.extend, left_out=print, progress=interrupt
        )
    assert [row.provider for row in kept] == ["llmkern"]


@pytest.mark.parametrize("op", ops_with_sweeps())
def test_every_op_has_sweeps_that_every_contender_here_can_be_judged_on(op: str, ceilings, monkeypatch) -> None:
    """The quick points at few rows, by every peer that is installed but the compiler, which takes seconds."""
    monkeypatch.setattr(run_ops, "MOST_SETS", 1)
    chosen = {}
    for point in points(op, CPU, quick=True):
        limits = {name: min(size, point.sweep.check.get(name, size), 64) for name, size in point.sizes.items()}
        small = dataclasses.replace(point.sweep, sizes=limits, x=point.sweep.x[:1])
        chosen[point.sweep.title] = dataclasses.replace(point, sweep=small, value=limits[small.x[0]])
    assert chosen
    here = [peer for peer in peers().values() if peer.missing() is None]
    for point in chosen.values():
        inputs = point.inputs()
        who = [c for c in contenders(point, inputs.call, here) if c.provider != "torch-compile"]
        rows = run_point(point, [], Instant(), ceilings, seconds=0.0, chosen=lambda *_, who=who: who)
        ours = next(row for row in rows if row.provider == "llmkern")
        assert ours.p50 is not None, ours.error
        for row in rows:
            judged = row.p50 is not None or row.error.startswith(("not supported", "judged only"))
            assert judged, (row.provider, row.error)


def test_definitions_name_the_sizes_of_their_op() -> None:
    assert set(ops_with_sweeps()) == set(ops_with_cases()) - WHOLE_LAYERS - LOSSES
    for op in ops_with_sweeps():
        for sweep in definition(op).SWEEPS:
            assert {*sweep.sizes, *sweep.x} == set(sizes(op)), (op, sweep.title)
            assert set(sweep.check) <= set(sizes(op))
        assert any(sweep.quick for sweep in definition(op).SWEEPS)


def test_quick_on_a_gpu_takes_the_middle_and_the_largest_value() -> None:
    found = points("attention", torch.device("cuda"), quick=True)
    assert {point.value for point in found if point.sweep.title == "dim 128, causal"} == {4096, 16384}
    assert {point.mode for point in found} == {"forward"}
    assert len(points("attention", CPU, quick=True)) == 1


def test_peers_say_why_they_are_absent() -> None:
    assert (
        need("no_such_module", "no-such-package")() == "no-such-package is not installed: pip install no-such-package"
    )
    assert list(peers())[0] == "torch"
    assert list(peers_named("torchao,torch")) == ["torchao", "torch"]
    assert peers_named("none") == {}
    with pytest.raises(ValueError, match="unknown peer 'tensorrt'; there are torch, "):
        peers_named("tensorrt")


def test_a_peer_is_an_adapter_of_a_few_lines(point, ceilings) -> None:
    peer = Peer("mine")

    @peer.op("rms_norm")
    def rms_norm(call):
        return lambda: torch.nn.functional.rms_norm(call["x"], (64,), call["weight"], call["eps"])

    rows = run_point(point, [peer], Instant(), ceilings, seconds=0.0)
    assert [(row.provider, row.p50) for row in rows] == [("llmkern", 1000.0), ("mine", 1000.0)]


_LIGER = """
import dataclasses, torch
from llmkern.bench.accuracy import Judge
from llmkern.bench.peer import peers_named
from llmkern.bench.sweep import points
peer = peers_named("liger")["liger"]
assert peer.missing() is None, peer.missing()
for op in ("rms_norm", "layer_norm"):
    (way,) = peer.ops[op]
    assert not way.timed()
    for mode in ("forward", "backward"):
        point = points(op, torch.device("cpu"), quick=True)[0]
        sweep = dataclasses.replace(point.sweep, sizes=dict.fromkeys(point.sweep.sizes, 8))
        judge = Judge(dataclasses.replace(point, sweep=sweep, value=48, mode=mode))
        assert "error" in judge.check(lambda inputs: way.prepare(inputs.call), way.approximate)  # else Wrong is raised
        print("right:", op, mode)
"""


def test_ligers_kernels_are_right_in_tritons_interpreter() -> None:
    """In a process of its own: Triton decides once, at import, that it interprets."""
    pytest.importorskip("liger_kernel")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", _LIGER], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("right:") == 4
