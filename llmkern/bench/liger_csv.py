"""The columns of Liger-Kernel's benchmark CSV, so that the tools that plot it read ours."""

from __future__ import annotations

import csv
import importlib.metadata
import json
from pathlib import Path

from llmkern.bench.schema import Result, Row

__all__ = ["COLUMNS", "write_csv"]

COLUMNS = (
    "kernel_name",
    "kernel_provider",
    "kernel_operation_mode",
    "metric_name",
    "metric_unit",
    "x_name",
    "x_label",
    "x_value",
    "y_value_50",
    "y_value_20",
    "y_value_80",
    "extra_benchmark_config_str",
    "gpu_name",
    "timestamp",
    "liger_version",
)
_LABELS = {
    "M": "rows",
    "rows": "rows",
    "hidden": "hidden size",
    "S": "sequence length",
    "Sq": "sequence length",
    "Skv": "tokens in the cache",
}


def label(name: str) -> str:
    """An axis in words."""
    return _LABELS.get(name, name)


def write_csv(path: Path, result: Result) -> None:
    """The rows of the ops suite that have a number.  The last column, so named by its readers, has our version."""
    try:
        version = importlib.metadata.version("llmkern")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    environment = result.environment
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in result.rows:
            if row.suite == "ops" and row.p50 is not None:
                writer.writerow(_line(row, environment["device"], environment["timestamp"], version))


def _line(row: Row, device: str, timestamp: str, version: str) -> dict[str, object]:
    config = {name: value for name, value in row.x.items() if name not in ("x", "mode", row.x["x"])}
    milliseconds = {name: getattr(row, name) / 1e3 for name in ("p20", "p50", "p80")}
    return {
        "kernel_name": row.name,
        "kernel_provider": row.provider,
        "kernel_operation_mode": row.x["mode"],
        "metric_name": "speed" if row.metric == "time_us" else "kernel_speed",
        "metric_unit": "ms",
        "x_name": row.x["x"],
        "x_label": label(row.x["x"]),
        "x_value": row.x[row.x["x"]],
        "y_value_50": milliseconds["p50"],
        "y_value_20": milliseconds["p20"],
        "y_value_80": milliseconds["p80"],
        "extra_benchmark_config_str": json.dumps(config),
        "gpu_name": device,
        "timestamp": timestamp.replace("T", " ").split("+")[0],
        "liger_version": version,
    }
