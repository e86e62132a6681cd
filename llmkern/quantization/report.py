"""What `quantize_` did, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from llmkern.table import collapse, render

__all__ = ["Action", "QuantReport", "QuantRow"]

Action = Literal["int8 w8a8", "int8 weight-only", "left"]


@dataclass(frozen=True)
class QuantRow:
    """One linear layer, or an embedding.

    path: the module's name within the model.  kind: Linear, Conv1D or Embedding.  shape: (out, in), (rows, columns).
    action: "int8 w8a8", "int8 weight-only" or "left" in floating point.
    weight_error: ‖W − Ŵ‖ / ‖W‖ of the int8 weight.  output_error: of W8A8, the root mean square over tokens of
    ‖y − ŷ‖ / ‖y‖.  None where nothing was measured.
    smoothed: its input was smoothed into the norm before it.  reason: why it is not W8A8; "" if it is.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    action: Action
    weight_error: float | None
    output_error: float | None
    smoothed: bool
    reason: str


@dataclass(frozen=True)
class QuantReport:
    """The rows of one `quantize_` call; prints as a table in which repeated layers take one line.

    measured_on: the inputs behind the output errors.  bytes_before, bytes_after: of the model's parameters and
    buffers.
    """

    rows: tuple[QuantRow, ...]
    measured_on: str
    bytes_before: int
    bytes_after: int

    @property
    def quantized(self) -> tuple[QuantRow, ...]:
        return tuple(row for row in self.rows if row.action != "left")

    @property
    def left(self) -> tuple[QuantRow, ...]:
        return tuple(row for row in self.rows if row.action == "left")

    def to_dict(self) -> dict[str, Any]:
        """`{"rows": [{"path", "kind", "shape", "action", …}], "measured_on", "bytes_before", "bytes_after"}`."""
        return asdict(self)

    def __iter__(self) -> Iterator[QuantRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = collapse(
            (row.path, (row.kind, "×".join(map(str, row.shape)), row.action, row.smoothed, row.reason))
            for row in self.rows
        )
        cells = [
            (
                path,
                count,
                kind,
                shape,
                action,
                _span([self.rows[i].weight_error for i in members]),
                _span([self.rows[i].output_error for i in members]),
                "yes" if smoothed else "",
                reason,
            )
            for path, count, (kind, shape, action, smoothed, reason), members in lines
        ]
        before, after = self.bytes_before / 2**20, self.bytes_after / 2**20
        title = (
            f"{len(self.quantized)} of {len(self.rows)} layers int8, {before:.1f} → {after:.1f} MiB; "
            f"errors measured on {self.measured_on}"
        )
        headers = ("module", "×", "kind", "out×in", "action", "weight error", "W8A8 error", "smoothed", "because")
        return render(title, headers, cells)


def _span(errors: list[float | None]) -> str:
    """`1.2%` or `1.2–3.4%`."""
    known = sorted(error for error in errors if error is not None)
    if not known:
        return ""
    low, high = f"{100 * known[0]:.2f}", f"{100 * known[-1]:.2f}"
    return f"{low}%" if low == high else f"{low}–{high}%"
