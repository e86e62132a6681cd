"""Plots that a person can read: our line, the peers, the ceiling.  Needs matplotlib."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmkern.bench.environment import slug
from llmkern.bench.liger_csv import label
from llmkern.bench.schema import Result, Row
from llmkern.bench.tables import number

__all__ = ["missing", "plots", "write_plots"]

OURS = "#c0392b"
OTHERS = ("#2c6fbb", "#3a9a5b", "#8e6bbf", "#d99a2b", "#4aa5a5", "#7f7f7f", "#b5588f", "#6b7a2f", "#1f3d5c")
_OUR_SHADES = (OURS, "#e67e22", "#922b21", "#f1948a")
_SERVED = {
    "throughput_tokens_per_s": ("p50", "tokens/s of all clients"),
    "ttft_ms": ("p99", "first token, ms, p99"),
    "itl_ms": ("p99", "between tokens, ms, p99"),
}
_RATES = ("prefill_tokens_per_s", "decode_tokens_per_s", "sentences_per_s")


def missing() -> str | None:
    """Return why plots cannot be drawn, or None."""
    if importlib.util.find_spec("matplotlib") is None:
        return "plots are drawn by matplotlib, which is not installed: pip install matplotlib"
    return None


def write_plots(folder: Path, result: Result) -> list[Path]:
    """Write a PNG for each op, dtype and mode, for each model, and for each that is served; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, png in plots(result):
        path = folder / f"{name}.png"
        path.write_bytes(png)
        written.append(path)
    return written


def plots(result: Result) -> Iterator[tuple[str, bytes]]:
    """(name, PNG) of every plot; raises ModuleNotFoundError with the package to install."""
    if reason := missing():
        raise ModuleNotFoundError(reason)
    device = str(result.environment["device"])
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in result.rows:
        if row.suite == "ops" and row.metric == "time_us":
            groups.setdefault((row.name, row.x["dtype"], row.x["mode"]), []).append(row)
    for (op, dtype, mode), rows in groups.items():
        measured = [row for row in rows if row.p50 is not None]
        if measured:
            yield f"{op}-{dtype}-{mode}", _op_plot(f"{op}, {dtype}, {mode} · {device}", measured)
    for model in dict.fromkeys(row.name for row in result.rows if row.suite == "model"):
        rows = [row for row in result.rows if row.suite == "model" and row.name == model and row.p50 is not None]
        if any(row.metric in _RATES for row in rows):
            yield slug(model), _model_plot(f"{model} · {device}", rows)
    for model in dict.fromkeys(row.name for row in result.rows if row.suite == "serve"):
        rows = [row for row in result.rows if row.suite == "serve" and row.name == model and row.p50 is not None]
        if rows:
            yield f"{slug(model)}-served", _serve_plot(f"{model}, served · {device}", rows)


def _figure(columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure of its own, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # Without the software's name and version: the same result gives the same file.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _colours(providers: Sequence[str]) -> dict[str, str]:
    others = [name for name in providers if not name.startswith("llmkern")]
    found = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}
    return {name: found.get(name, OURS) for name in providers}


def _op_plot(title: str, rows: list[Row]) -> bytes:
    """A panel for each sweep: the rate that bounds the op over the size, the ceiling above."""
    sweeps = list(dict.fromkeys(row.x["sweep"] for row in rows))
    providers = list(dict.fromkeys(row.provider for row in rows))
    colours = _colours(providers)
    figure, axes = _figure(len(sweeps), 5.2, 4.2)
    figure.suptitle(title)
    for axis, sweep in zip(axes, sweeps, strict=True):
        own = [row for row in rows if row.x["sweep"] == sweep]
        x = own[0].x["x"]
        rate, unit = ("tflop_per_s", "TFLOP/s") if own[-1].detail["operations"] else ("gb_per_s", "GB/s")
        for provider in providers:
            line = sorted((row.x[x], row.detail[rate]) for row in own if row.provider == provider)
            _draw_line(axis, line, provider, colours[provider])
        ceiling = {row.x[x]: row.detail[rate] / row.speed_of_light for row in own if row.speed_of_light}
        points = sorted(ceiling.items())
        axis.plot(*zip(*points, strict=True), "k--", linewidth=1, label="measured ceiling")
        axis.set_title(sweep, fontsize=10)
        _name_axes(axis, sorted(ceiling), label(x), unit)
    axes[0].legend(fontsize=8)
    return _png(figure)


def _draw_line(axis: Any, line: list[tuple[float, float]], provider: str, colour: str) -> None:
    if line:
        style = {"linewidth": 2.6, "zorder": 5} if provider.startswith("llmkern") else {"linewidth": 1.3}
        axis.plot(*zip(*line, strict=True), "o-", markersize=4, label=provider, color=colour, **style)


def _name_axes(axis: Any, places: Sequence[float], x: str, y: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(places, [str(value) for value in places], rotation=30, fontsize=8)
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.25)


def _serve_plot(title: str, rows: list[Row]) -> bytes:
    """A panel for throughput, first token and time between tokens, over the number of clients."""
    providers = list(dict.fromkeys(row.provider for row in rows))
    ours = [provider for provider in providers if provider.startswith("llmkern")]
    colours = _colours(providers) | dict(zip(ours, _OUR_SHADES, strict=False))
    places = sorted({row.x["clients"] for row in rows})
    figure, axes = _figure(len(_SERVED), 4.6, 4.2)
    figure.suptitle(title)
    for axis, (metric, (percentile, said)) in zip(axes, _SERVED.items(), strict=True):
        for provider in providers:
            own = [row for row in rows if (row.provider, row.metric) == (provider, metric)]
            line = [(row.x["clients"], row.detail["p99"] if percentile == "p99" else row.p50 or 0.0) for row in own]
            _draw_line(axis, sorted(line), provider, colours[provider])
        _name_axes(axis, places, "clients", said)
    axes[0].legend(fontsize=8)
    return _png(figure)


def _model_plot(title: str, rows: list[Row]) -> bytes:
    """Bars of each rate, a line of the plot for each variant, with what was printed at its end."""
    metrics = [metric for metric in _RATES if any(row.metric == metric for row in rows)]
    variants = list(dict.fromkeys(row.provider for row in rows))
    figure, axes = _figure(len(metrics), 5.6, 0.34 * len(variants) + 1.5)
    figure.suptitle(title)
    for axis, metric in zip(axes, metrics, strict=True):
        values = {row.provider: row for row in rows if row.metric == metric}
        for place, variant in enumerate(variants):
            if row := values.get(variant):
                low, middle, high = row.p20 or 0.0, row.p50 or 0.0, row.p80 or 0.0
                colour = OURS if variant.startswith("llmkern") else OTHERS[0]
                spread = [[middle - low], [high - middle]]
                axis.barh(place, middle, color=colour, xerr=spread, error_kw={"elinewidth": 0.8, "ecolor": "#444444"})
                axis.annotate(f" {number(middle)}", (high, place), va="center", fontsize=8)
        axis.set_yticks(range(len(variants)), variants if axis is axes[0] else [""] * len(variants), fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_xlabel(metric.replace("_per_s", "/s").replace("_", " "))
        axis.grid(axis="x", alpha=0.25)
    return _png(figure)
