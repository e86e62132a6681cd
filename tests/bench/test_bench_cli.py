from __future__ import annotations

import json
import os
import signal

import pytest

from llmkern.bench import ceilings, run_ops, tpu
from llmkern.bench.readme import results
from llmkern.bench.schema import Result
from llmkern.cli import run
from llmkern.jax import interpreted


@pytest.fixture
def quick_ceilings(monkeypatch) -> None:
    """Seconds of measuring that no test needs."""
    fixed = ceilings.Ceilings(1e10, 1e10, {"float32": 1e11})
    monkeypatch.setattr(ceilings, "ceilings", lambda device: fixed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ops", "--op", "softmax"], "unknown op 'softmax'; there are add_layer_norm, "),
        (["ops", "--peers", "tensorrt"], "unknown peer 'tensorrt'; there are torch, "),
        (["ops", "--op", "rms_norm", "--shape", "8"], "--shape is '8', expected rows,hidden as whole numbers"),
        (["ops", "--op", "rms_norm", "--shape", "8,-1"], "--shape is '8,-1', expected rows,hidden"),
        (["ops", "--shape", "8,8"], "--shape is for one op: give it with --op NAME"),
        (["ops", "--dtype", "int4"], "--dtype is 'int4', expected float32"),
        (["ops", "--device", "tpu"], "--device is 'tpu': JAX "),
        (["ops", "--json", "."], "--json is ., which is a folder; expected a file"),
        (["train", "demo:smollm2", "--dtype", "float16"], "--dtype is 'float16', expected float32 or bfloat16"),
        (["train", "demo:smollm2", "--batch", "0"], "--batch is 0, expected at least 1"),
        (["compare", "absent.json", "absent.json"], "absent.json cannot be read: No such file or directory"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], message: str, capsys) -> None:
    assert run(["bench", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_a_tpus_kernels_are_judged_and_timed(tmp_path, capsys, monkeypatch) -> None:
    """The path of `--device tpu`, in the interpreter."""
    pytest.importorskip("jax")
    monkeypatch.setattr(run_ops, "MOST_SETS", 1)
    monkeypatch.setattr(tpu, "missing", lambda: None)
    path = tmp_path / "ops.json"
    command = [
        "bench",
        "ops",
        "--op",
        "rms_norm",
        "--shape",
        "4,64",
        "--dtype",
        "bfloat16",
        "--device",
        "tpu",
        "--quick",
    ]
    with interpreted():
        assert run([*command, "--json", str(path)]) == 0
    rows = Result.load(path).rows
    assert [(row.provider, row.x["mode"], row.error) for row in rows] == [
        ("llmkern", "forward", None),
        ("xla", "forward", None),
    ]
    assert rows[0].detail["note"].startswith("norm on v5e: x 4×64")
    assert all(row.accuracy["error"] >= 0 for row in rows)  # of results that are right; wrong ones have no time
    assert all(row.p50 > 0 and row.detail["ratio"]["to"] == "xla" for row in rows)
    assert "vs xla" in capsys.readouterr().out


def test_one_call_from_the_command_line(quick_ceilings, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(run_ops, "MOST_SETS", 1)
    path, table = tmp_path / "ops.json", tmp_path / "ops.csv"
    command = ["bench", "ops", "--op", "gelu", "--shape", "4,32", "--dtype", "float32", "--device", "cpu", "--quick"]
    assert run([*command, "--json", str(path), "--csv", str(table)]) == 0
    result = Result.load(path)
    assert {row.provider for row in result.rows} == {"llmkern", "torch"}
    assert {row.x["mode"] for row in result.rows} == {"forward", "backward"}
    assert all(row.p50 > 0 for row in result.rows)
    assert result.environment["threads"] >= 1
    assert result.environment["ceilings"]["matmul_tflop_per_s"] == {"float32": 0.1}
    assert "absent: " in capsys.readouterr().out
    assert table.read_text().startswith("kernel_name,")
    assert run(["bench", "compare", str(path), str(path), "--json"]) == 0
    assert {pair["ratio"] for pair in json.loads(capsys.readouterr().out)["pairs"]} == {1.0}


def test_a_recorded_run_lies_where_the_readme_looks(quick_ceilings, tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(run_ops, "MOST_SETS", 1)
    command = ["bench", "ops", "--op", "gelu", "--shape", "4,32", "--peers", "none", "--device", "cpu", "--quick"]
    assert run([*command, "--dtype", "float32", "--record", str(tmp_path)]) == 0
    ((path, result),) = results(tmp_path)
    assert path.name == "ops.json"
    assert len(result.rows) == 2
    names = [png.name for png in tmp_path.glob(f"plots/{path.parent.name}/ops/*.png")]
    assert sorted(names) == ["gelu-float32-backward.png", "gelu-float32-forward.png"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_keeps_what_was_measured(
    quick_ceilings, tmp_path, capsys, monkeypatch, request, number: int, status: int
) -> None:
    # What a shell starts in the background ignores SIGINT, and so would these tests.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, previous))
    original, done = run_ops.run_point, []
    before = signal.getsignal(signal.SIGTERM)

    def second_is_interrupted(*arguments, **options):
        if done:
            os.kill(os.getpid(), number)
        done.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(run_ops, "run_point", second_is_interrupted)
    path = tmp_path / "ops.json"
    command = ["bench", "ops", "--op", "gelu", "--shape", "4,32", "--peers", "none", "--dtype", "float32"]
    assert run([*command, "--device", "cpu", "--json", str(path)]) == status
    assert signal.getsignal(signal.SIGTERM) is before
    result = Result.load(path)
    assert result.environment["interrupted"]
    assert [(row.provider, row.x["mode"]) for row in result.rows] == [("llmkern", "forward")]
    shown = capsys.readouterr()
    assert "interrupted: 1 rows were measured" in shown.err
    assert shown.out.startswith("gelu")
