"""Results as tables: for the terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmkern.bench.schema import Row
from llmkern.table import render

__all__ = ["Table", "markdown", "number", "tables", "text"]

Table = tuple[str, list[str], list[list[str]]]
"""Title, headers, rows."""


def number(value: float | None) -> str:
    """Three significant digits; – for none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def text(rows: Sequence[Row]) -> str:
    """Format the table for the terminal."""
    return "\n\n".join(render(title, headers, cells) for title, headers, cells in tables(rows))


def markdown(rows: Sequence[Row]) -> str:
    """Format the table for a README."""
    parts = []
    for title, headers, cells in tables(rows):
        lines = [headers, ["---"] * len(headers), *cells]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        parts.append(f"**{title}**\n\n{body}")
    return "\n\n".join(parts)


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each op, one for each model, one for each model that is served."""
    found: list[Table] = []
    for suite, make in (("ops", _op_table), ("model", _model_table), ("serve", _serve_table)):
        names = dict.fromkeys(row.name for row in rows if row.suite == suite)
        found += [make(name, [row for row in rows if row.suite == suite and row.name == name]) for name in names]
    together = [row for row in rows if row.suite == "families"]
    return [*found, _families_table(together)] if together else found


def _families_table(rows: list[Row]) -> Table:
    """A line for each family, dtype and phase: ratios above 1 are faster than untouched."""
    headers = ["family", "layers", "dtype", "phase", "optimized ÷ untouched (20–80%)", "ms", "run whole", "note"]
    cells = []
    for row in rows:
        ratio = row.detail.get("ratio")
        cells.append(
            [
                f"{row.name} ({row.x['of']})",
                str(row.x["layers"]),
                row.x["dtype"],
                row.x["phase"],
                f"{ratio['p50']:.2f}× ({ratio['p20']:.2f}–{ratio['p80']:.2f})" if ratio else "–",
                number(1e3 / row.p50 if row.p50 else None),
                row.detail.get("layers", "–"),
                row.error or "",
            ]
        )
    return "families, untouched beside optimized", headers, cells


def _op_table(name: str, rows: list[Row]) -> Table:
    baseline = next((row.detail["ratio"]["to"] for row in rows if "ratio" in row.detail), "torch")
    headers = ["sweep", "size", "provider", "µs (20–80%)", f"vs {baseline}", "rate", "of ceiling", "error, remarks"]
    cells = []
    for row in rows:
        x = row.x
        ratio = row.detail.get("ratio")
        mode = "" if x["mode"] == "forward" else f", {x['mode']}"
        inside = " in a graph" if row.metric == "kernel_us" else ""
        spread = f" ({number(row.p20)}–{number(row.p80)})" if row.p50 is not None else ""
        cells.append(
            [
                f"{x['sweep']}, {x['dtype']}{mode}",
                f"{x['x']}={x[x['x']]}",
                row.provider + inside,
                number(row.p50) + spread,
                f"{ratio['p50']:.2f}×" if ratio else "–",
                _rate(row.detail) if row.p50 is not None else "–",
                "–" if row.speed_of_light is None else f"{row.speed_of_light:.0%}",
                "; ".join(filter(None, _remarks(row))),
            ]
        )
    return name, headers, cells


def _rate(detail: dict[str, Any]) -> str:
    moved = f"{number(detail['gb_per_s'])} GB/s"
    return f"{number(detail['tflop_per_s'])} TFLOP/s, {moved}" if detail["operations"] else moved


def _remarks(row: Row) -> list[str]:
    """Return the error by the rule that judged it, and further remarks."""
    accuracy, found = row.accuracy, []
    if "relative_error" in accuracy:
        found.append(f"{accuracy['relative_error']:.1e} relative")
    elif "error" in accuracy:
        found.append(f"error {accuracy['error']:.1e}, PyTorch's {accuracy['baseline']:.1e}")
    elif "rule" in accuracy:
        found.append("exact" if accuracy["rule"] == "bits" else "right")
    return [*found, accuracy.get("approximate", ""), row.detail.get("note", ""), row.error or ""]


_ACCURACY: dict[str, tuple[str, Callable[[float], str]]] = {
    "perplexity": ("perplexity", lambda v: f"{v:.3f}"),
    "top1": ("top-1 agreement", lambda v: f"{v:.2%}"),
    "max_abs": ("largest difference", lambda v: f"{v:.2g}"),
    "rel": ("relative difference", lambda v: f"{v:.1e}"),
    "cosine": ("mean cosine", lambda v: f"{v:.5f}"),
}
_COLUMNS = {
    "prefill_tokens_per_s": "prefill tokens/s",
    "decode_tokens_per_s": "decode tokens/s",
    "sentences_per_s": "sentences/s",
    "train_tokens_per_s": "trained tokens/s",
    "ttft_ms": "first token, ms",
    "itl_ms": "between tokens, ms (p50/p90/p99)",
    "peak_memory_mb": "peak memory, MB",
    "model_memory_mb": "of it the model, MB",
}


def _model_table(name: str, rows: list[Row]) -> Table:
    """A line for each variant; every metric with its ratio to the first variant's, where it is a rate."""
    metrics = [metric for metric in _COLUMNS if any(row.metric == metric for row in rows)]
    measures = [key for key in _ACCURACY if any(key in row.accuracy for row in rows)]
    headers = ["variant", *[_COLUMNS[m] for m in metrics], *[_ACCURACY[key][0] for key in measures], "note"]
    cells = []
    for provider in dict.fromkeys(row.provider for row in rows):
        own = {row.metric: row for row in rows if row.provider == provider}
        accuracy = {key: value for row in own.values() for key, value in row.accuracy.items()}
        errors = dict.fromkeys(row.error for row in own.values() if row.error)
        cells.append(
            [
                provider,
                *[_model_cell(own.get(metric)) for metric in metrics],
                *[_ACCURACY[k][1](accuracy[k]) if accuracy.get(k) is not None else "–" for k in measures],
                "; ".join([*errors, *filter(None, [accuracy.get("unjudged")])]),
            ]
        )
    x = next((row.x for row in rows), {})
    sizes = ", ".join(f"{key} {value}" for key, value in x.items() if key != "dtype")
    return f"{name}: {sizes}", headers, cells


def _model_cell(row: Row | None) -> str:
    if row is None or row.p50 is None:
        return "–"
    if row.metric == "itl_ms":
        return f"{number(row.p50)} / {number(row.detail.get('p90'))} / {number(row.detail.get('p99'))}"
    ratio = row.detail.get("ratio")
    return number(row.p50) + (f" ({ratio['p50']:.2f}×)" if ratio else "")


def _serve_table(name: str, rows: list[Row]) -> Table:
    """A line for each server and number of clients, with the throughput's ratio to the first server's."""
    headers = [
        "server",
        "clients",
        "tokens/s",
        "first token, ms (p50/p99)",
        "between tokens, ms (p50/p99)",
        "peak memory, MB",
        "requests, failed",
        "note",
    ]
    cells, first = [], next((row.provider for row in rows), "")
    for provider, clients in dict.fromkeys((row.provider, row.x["clients"]) for row in rows):

        def of(who: str, clients: int = clients) -> dict[str, Row]:
            return {row.metric: row for row in rows if row.provider == who and row.x["clients"] == clients}

        own, base = of(provider), of(first).get("throughput_tokens_per_s")
        speed = own["throughput_tokens_per_s"]
        ratio = f" ({speed.p50 / base.p50:.2f}×)" if base is not None and base.p50 and speed.p50 else ""
        memory = own.get("peak_memory_mb")
        cells.append(
            [
                provider,
                str(clients),
                number(speed.p50) + ratio,
                *[_median_and_p99(own.get(metric)) for metric in ("ttft_ms", "itl_ms")],
                number(None if memory is None else memory.p50),
                f"{speed.detail['requests']}, {speed.detail['errors']}",
                speed.error or "",
            ]
        )
    x = next((row.x for row in rows), {})
    sizes = ", ".join(f"{key} {value}" for key, value in x.items() if key != "clients")
    return f"{name}, served: {sizes}", headers, cells


def _median_and_p99(row: Row | None) -> str:
    return "–" if row is None else f"{number(row.p50)} / {number(row.detail.get('p99'))}"
