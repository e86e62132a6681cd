"""Tables for people: every report of llmkern prints through `render`."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

__all__ = ["render"]


def render(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]], *, width: int | None = None) -> str:
    """A plain-text table, as wide as the terminal (120 columns where there is none); cells wrap, nothing is cut."""
    table = Table(title=title or None, title_justify="left", header_style="bold", expand=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*["" if cell is None else str(cell) for cell in row])
    console = Console(file=io.StringIO(), width=width or Console().width or 120, highlight=False, markup=False)
    console.print(table)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]
