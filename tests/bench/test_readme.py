from __future__ import annotations

import copy
import json

from llmkern.bench.readme import benchmarks_readme, choices, newest_models, paths
from llmkern.bench.schema import Result, Row


def model(result: Result, day: int, decode: float) -> Result:
    """A result of one model, measured on that day of January."""
    environment = result.environment | {"timestamp": f"2026-01-{day:02}T00:00:00+00:00"}
    row = Row("model", "demo:smollm2", "llmkern fp32", "decode_tokens_per_s", {"batch": 1}, decode, decode, decode)
    return Result("llmkern bench model demo:smollm2", environment, [row])


def committed(tmp_path, result: Result):
    """A benchmarks folder with an ops result, two of a model, a plot, and a file that is none of ours."""
    result.environment |= {"software": {"torch": "2.13.0"}, "library": {"cpu_isa": "avx512"}}
    folder = tmp_path / "benchmarks"
    for name, content in (("ops", result), ("new", model(result, 9, 33.0)), ("old", model(result, 1, 22.0))):
        path, plots = paths(folder, "a-cpu", name)
        content.save(path)
    plots = paths(folder, "a-cpu", "ops")[1]
    plots.mkdir(parents=True)
    (plots / "rms_norm.png").write_bytes(b"")
    (folder / "results" / "a-cpu" / "check.json").write_text('{"command": "llmkern check"}')
    return folder


def test_the_newest_result_of_a_model_is_shown_whatever_its_name(tmp_path, result) -> None:
    shown = newest_models(committed(tmp_path, result))
    assert "| llmkern fp32 | 33 |" in shown
    assert "| 22 |" not in shown
    assert "(benchmarks/results/a-cpu/new.json)" in shown
    assert "A CPU, 2 threads, 2026-01-09" in shown


def test_each_device_keeps_its_newest_result(tmp_path, result) -> None:
    folder = committed(tmp_path, result)
    other = model(result, 20, 44.0)
    other.environment["device"] = "B CPU"
    other.save(paths(folder, "b-cpu", "newer")[0])
    shown = newest_models(folder)
    assert "| llmkern fp32 | 33 |" in shown
    assert "| llmkern fp32 | 44 |" in shown


def test_every_result_has_its_table_plots_and_source(tmp_path, result) -> None:
    folder = committed(tmp_path, copy.deepcopy(result))
    shown = benchmarks_readme(folder)
    assert shown.count("## A CPU") == 1
    assert "![rms_norm](plots/a-cpu/ops/rms_norm.png)" in shown
    assert "commit abc, 2 threads, torch 2.13.0, library for avx512, [JSON](results/a-cpu/ops.json)" in shown
    assert "Absent: liger: Liger-Kernel needs a GPU." in shown
    assert "| llmkern fp32 | 33 |" in shown
    assert "check" not in shown.split("## A CPU")[1]


def test_what_schemes_cost_is_one_table_for_each_model(tmp_path) -> None:
    folder = tmp_path / "results" / "a-cpu"
    folder.mkdir(parents=True)
    for scheme, size in (("int4", 25), ("int8", 50)):
        result = {
            "model": "demo:small",
            "bytes": [100 << 20, size << 20],
            "perplexity": {"original": 20.0, "optimized": 20.0, scheme: 21.0},
            "divergence": {"mean": 0.01, "p999": 0.5, "same_top": 0.9, "perplexity": 21.0},
            "speed": {"original": {"prefill": 1000.0, "decode": 10.0}, scheme: {"prefill": 2000.0, "decode": 40.0}},
        }
        content = {"command": "", "environment": {"hardware": {"cpu": "A CPU"}}, "result": result}
        (folder / f"check_small_{scheme}.json").write_text(json.dumps(content))
    lines = choices(tmp_path).splitlines()
    assert lines[0] == "`llmkern check demo:small --quantize …` on an A CPU:"
    assert lines[4].startswith("| none | 100 MiB | 1,000 | 10.0 | 20.000 |")
    assert lines[5].startswith(
        "| `int8` | 50 MiB (0.50×) | 2,000 (2.00×) | 40.0 (4.00×) | 21.000 (1.0500×) | 0.01 | 0.5 |"
    )
    assert lines[6].startswith("| `int4` | 25 MiB (0.25×)")


def test_without_results_both_say_so(tmp_path) -> None:
    assert choices(tmp_path) == "No result is committed yet."
    assert newest_models(tmp_path) == "No result is committed yet."
    assert benchmarks_readme(tmp_path).endswith("No result is committed yet.\n")
