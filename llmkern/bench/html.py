"""One self-contained page of a result: tables, plots, environment, accuracy beside speed."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from llmkern.bench import plots
from llmkern.bench.schema import Result
from llmkern.bench.tables import tables

__all__ = ["page", "write_html"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 82rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: .5rem 0 1.5rem }
td, th { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #888 } tr.ours td { background: #fdf0ee; font-weight: 600 }
img { max-width: 100% } code { background: #f3f3f3; padding: .1rem .3rem } .wide { overflow-x: auto }
"""


def write_html(path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(result), encoding="utf-8")


def page(result: Result) -> str:
    """The page; without matplotlib it says so in place of the plots."""
    environment = result.environment
    parts = [
        f"<h1>llmkern bench · {escape(str(environment['device']))}</h1>",
        f"<p><code>{escape(result.command)}</code>, {escape(str(environment['timestamp']))}, "
        f"commit {escape(str(environment['git_commit']))}, {environment['threads']} threads</p>",
    ]
    if environment["interrupted"]:
        parts.append("<p><strong>Interrupted: what was measured until then.</strong></p>")
    reason = plots.missing()
    if reason:
        parts.append(f"<p>{escape(reason)}</p>")
    else:
        parts += [f'<p><img alt="{escape(name)}" src="{_inline(png)}"></p>' for name, png in plots.plots(result)]
    for title, headers, cells in tables(result.rows):
        parts.append(f"<h2>{escape(title)}</h2>{_table(headers, cells)}")
    parts.append(f"<h2>Environment</h2>{_table(['', ''], _flat(environment))}")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>llmkern bench</title>'
        f"<style>{_STYLE}</style>\n<body>\n{body}\n</body></html>\n"
    )


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _table(headers: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    lines = []
    for row in rows:
        ours = ' class="ours"' if any(cell.startswith("llmkern") for cell in row[:3]) else ""
        lines.append(f"<tr{ours}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _flat(value: Any, path: str = "") -> list[list[str]]:
    """Nested dictionaries as lines of dotted names."""
    if isinstance(value, dict):
        return [line for key, item in value.items() for line in _flat(item, f"{path}.{key}" if path else str(key))]
    return [[path, ", ".join(map(str, value)) if isinstance(value, list) else str(value)]]
