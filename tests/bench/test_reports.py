"""What becomes of a result: JSON, CSV, tables, plots, a page, a comparison."""

from __future__ import annotations

import copy
import csv
import json

import pytest

from llmkern.bench import plots
from llmkern.bench.compare import compare
from llmkern.bench.html import page
from llmkern.bench.liger_csv import COLUMNS, write_csv
from llmkern.bench.schema import METRICS, Result, Row
from llmkern.bench.tables import markdown, text


def test_json_keeps_every_field(result, tmp_path) -> None:
    path = tmp_path / "folder" / "result.json"
    result.save(path)
    assert Result.load(path) == result
    content = json.loads(path.read_text())
    assert set(content) == {"schema", "command", "environment", "rows"}
    wanted = {"suite", "name", "provider", "metric", "unit", "x", "p20", "p50", "p80"}
    assert wanted | {"speed_of_light", "accuracy", "detail", "error"} == set(content["rows"][0])
    assert content["rows"][0]["unit"] == METRICS["time_us"]


def test_json_has_no_nan(result, tmp_path) -> None:
    result.rows[0].p50 = float("nan")
    result.save(tmp_path / "result.json")
    assert Result.load(tmp_path / "result.json").rows[0].p50 is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "is no result of llmkern bench"),
        ("[]", "is no result of llmkern bench"),
        ('{"schema": 99}', "has schema 99, expected 1"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content: str, message: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Result.load(path)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        Result.load(tmp_path / "absent.json")


def test_the_csv_has_ligers_columns_and_units(result, tmp_path) -> None:
    path = tmp_path / "ops.csv"
    write_csv(path, result)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    # As in benchmark/data/all_benchmark_data.csv of linkedin/Liger-Kernel.
    expected = "kernel_name,kernel_provider,kernel_operation_mode,metric_name,metric_unit,x_name,x_label,x_value,"
    expected += "y_value_50,y_value_20,y_value_80,extra_benchmark_config_str,gpu_name,timestamp,liger_version"
    assert path.read_text().splitlines()[0] == expected == ",".join(COLUMNS)
    assert len(rows) == 3  # the row without a number is left out
    first = rows[0]
    assert (first["metric_name"], first["metric_unit"], first["x_name"], first["x_value"]) == (
        "speed",
        "ms",
        "hidden",
        "64",
    )
    assert float(first["y_value_50"]) == pytest.approx(0.010)
    assert float(first["y_value_20"]) == pytest.approx(0.009)
    assert json.loads(first["extra_benchmark_config_str"]) == {"sweep": "8 rows", "dtype": "float32", "rows": 8}
    assert first["timestamp"] == "2026-01-02 03:04:05"


def changed(result: Result, factor: float, metric: str = "time_us") -> tuple[Result, Result]:
    """The result with one row, and the same row `factor` times as large, both with a spread of 10%."""
    old, new = copy.deepcopy(result), copy.deepcopy(result)
    old.rows, new.rows = [old.rows[0]], [new.rows[0]]
    for row in (old.rows[0], new.rows[0]):
        row.metric = metric
    row = new.rows[0]
    row.p20, row.p50, row.p80 = row.p20 * factor, row.p50 * factor, row.p80 * factor
    return old, new


@pytest.mark.parametrize(
    ("factor", "metric", "verdict"),
    [
        (1.5, "time_us", "worse"),
        (0.5, "time_us", "better"),
        (1.15, "time_us", ""),
        (1.5, "decode_tokens_per_s", "better"),
        (0.5, "decode_tokens_per_s", "worse"),
        (1.5, "perplexity", "worse"),
    ],
)
def test_compare_marks_what_is_beyond_the_noise(result, factor: float, metric: str, verdict: str) -> None:
    (pair,) = compare(*changed(result, factor, metric)).pairs
    assert pair.verdict == verdict
    assert pair.ratio == pytest.approx(factor if metric.endswith("per_s") else 1 / factor)


def test_compare_lists_what_only_one_has_and_where_the_machines_differ(result) -> None:
    old, new = copy.deepcopy(result), copy.deepcopy(result)
    new.environment["device"] = "Another CPU"
    del new.rows[1]
    old.rows[2].p50 = None
    found = compare(old, new)
    assert [row.provider for row in found.lost] == ["torch"]
    assert [row.x["hidden"] for row in found.gained] == [128]
    printed = str(found)
    assert "device: A CPU → Another CPU" in printed
    assert "0 better, 0 worse, 1 within the noise" in printed


def test_numbers_without_a_spread_are_compared_to_a_thousandth(result) -> None:
    for factor, verdict in ((1.0005, ""), (1.01, "worse")):
        old, new = changed(result, factor, "perplexity")
        for row in (old.rows[0], new.rows[0]):
            row.p20 = row.p80 = None
        assert compare(old, new).pairs[0].verdict == verdict


def model_rows() -> list[Row]:
    x = {"batch": 1, "prompt_len": 512}
    rate = {"ratio": {"to": "sdpa", "p20": 2.9, "p50": 3.0, "p80": 3.1}}
    accuracy = {"perplexity": 26.53, "top1": 0.99}
    return [
        Row("model", "demo", "sdpa", "decode_tokens_per_s", x, 9.0, 10.0, 11.0, accuracy=accuracy),
        Row("model", "demo", "llmkern", "decode_tokens_per_s", x, 29.0, 30.0, 31.0, accuracy=accuracy, detail=rate),
        Row("model", "demo", "llmkern", "itl_ms", x, 30.0, 33.0, 36.0, detail={"p90": 40.0, "p99": 50.0}),
        Row("model", "demo", "llama.cpp-Q8_0", "decode_tokens_per_s", x, error="SIGSEGV"),
    ]


def test_tables_show_speed_and_accuracy_side_by_side(result) -> None:
    result.rows += model_rows()
    shown = markdown(result.rows)
    assert "| llmkern | 30 (3.00×) | 33 / 40 / 50 | 26.530 | 99.00% |  |" in shown
    assert "| llama.cpp-Q8_0 | – | – | – | – | SIGSEGV |" in shown
    assert "| 8 rows, float32 | hidden=64 | llmkern | 10 (9–11) |" in shown
    assert "the result is wrong: error 3" in shown
    assert text(result.rows).count("demo: batch 1") == 1


def test_plots_and_page(result, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    result.rows += model_rows()
    written = plots.write_plots(tmp_path, result)
    assert [path.name for path in written] == ["rms_norm-float32-forward.png", "demo.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    shown = page(result)
    assert shown.count("data:image/png;base64,") == 2
    assert "http" not in shown  # nothing is fetched
    assert "abc" in shown
    assert "99.00%" in shown


def test_a_plot_of_servers_has_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[tuple[str, list[tuple[float, float]]]] = []
    monkeypatch.setattr(plots, "_draw_line", lambda axis, line, provider, colour: drawn.append((provider, line)))

    def row(provider: str, metric: str, clients: int, value: float) -> Row:
        return Row("serve", "tiny", provider, metric, {"clients": clients}, p50=value, detail={"p99": 10 * value})

    metrics = ("throughput_tokens_per_s", "ttft_ms", "itl_ms")
    rows = [row(who, metric, n, float(n)) for who in ("llmkern", "peer") for metric in metrics for n in (1, 4)]
    served = Result("llmkern bench serve", {"device": "a CPU"}, [*rows, Row("serve", "tiny", "late", metrics[0], {})])
    assert [name for name, _ in plots.plots(served)] == ["tiny-served"]
    throughput, latency = [(1, 1.0), (4, 4.0)], [(1, 10.0), (4, 40.0)]
    assert drawn == [(who, line) for line in (throughput, latency, latency) for who in ("llmkern", "peer")]


def test_the_page_without_matplotlib_says_so(result, monkeypatch) -> None:
    monkeypatch.setattr(plots, "missing", lambda: "plots are drawn by matplotlib, which is not installed")
    shown = page(result)
    assert "plots are drawn by matplotlib" in shown
    assert "<img" not in shown
    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        list(plots.plots(result))


def test_a_page_escapes_what_it_shows(result) -> None:
    result.rows[0].error = "<script>"
    assert "<script>" not in page(result)
