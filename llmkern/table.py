"""Tables for people: every report of llmkern prints through `render`."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.table import Table

__all__ = ["collapse", "render"]

Rest = TypeVar("Rest", bound="tuple[object, ...]")


def render(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]], *, width: int | None = None) -> str:
    """Render a plain-text table, as wide as the terminal (120 columns without one); cells wrap, nothing is cut."""
    table = Table(title=title or None, title_justify="left", header_style="bold", expand=False)
    for column, header in enumerate(headers):
        # The first column says what the row is about, so it is the last to be broken into lines.
        longest = max((len(str(row[0])) for row in rows), default=0) if column == 0 else 0
        table.add_column(header, overflow="fold", min_width=min(longest, 40))
    for row in rows:
        table.add_row(*["" if cell is None else str(cell) for cell in row])
    console = Console(
        file=io.StringIO(), width=width or shutil.get_terminal_size((120, 24)).columns, highlight=False, markup=False
    )
    console.print(table)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def collapse(rows: Iterable[tuple[str, Rest]]) -> list[tuple[str, str, Rest, list[int]]]:
    """Rows that differ only in a layer's number become one, in order of appearance.

    Each is (the path, with * where numbers differ; "×n" or ""; what they share; the indices of the rows).
    """
    groups: dict[tuple[str, Rest], list[tuple[int, str]]] = {}
    for index, (path, rest) in enumerate(rows):
        pattern = re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", path)
        groups.setdefault((pattern, rest), []).append((index, path))
    return [
        (
            pattern if len(members) > 1 else members[0][1],
            f"×{len(members)}" if len(members) > 1 else "",
            rest,
            [index for index, _ in members],
        )
        for (pattern, rest), members in groups.items()
    ]
