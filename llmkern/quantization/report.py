"""Report what `quantize_` did, layer by layer, and what each layer is now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from llmkern.nn import Int8Linear, QuantizedEmbedding
from llmkern.nn._quantized_weight import QuantizedWeight
from llmkern.table import collapse, render

__all__ = ["QuantReport", "QuantRow", "current", "forget_report", "record_report", "tensor_bytes"]


@dataclass(frozen=True)
class QuantRow:
    """One linear layer, or an embedding.

    path: the module's name within the model.  kind: Linear, Conv1D or Embedding.  shape: (out, in), (rows, columns).
    action: "int8 w8a8", "int8 weight-only", the format of a packed weight ("int8-block", "int4 g64", "Q4_K" …, which
        round activations in blocks), or "left" in floating point.
    weight_error: ‖W − Ŵ‖ / ‖W‖ of the quantized weight.  output_error: with rounded activations, the root mean square
    over tokens of ‖y − ŷ‖ / ‖y‖.  None where nothing was measured.
    smoothed: its input was smoothed into the norm before it.  reason: why it is not as narrow as was asked for.
    divergence: KL divergence of the model's predictions that the layer in int4 causes by itself, the mean at a token in
    nats, estimated (`sensitivity.py`); None of other schemes and models without such predictions.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    action: str
    weight_error: float | None
    output_error: float | None
    smoothed: bool
    reason: str
    divergence: float | None = None


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

    def _formats(self) -> str:
        """Format names for a row: `int4 and int8`."""
        return " and ".join(sorted({row.action.split()[0] for row in self.quantized})) or "quantized"

    def __iter__(self) -> Iterator[QuantRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        measured = any(row.divergence is not None for row in self.rows)
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
                *([_sum([self.rows[i].divergence for i in members])] if measured else []),
                "yes" if smoothed else "",
                reason,
            )
            for path, count, (kind, shape, action, smoothed, reason), members in lines
        ]
        before, after = self.bytes_before / 2**20, self.bytes_after / 2**20
        title = (
            f"{len(self.quantized)} of {len(self.rows)} layers {self._formats()}, {before:.1f} → {after:.1f} MiB; "
            f"errors measured on {self.measured_on}"
        )
        columns = ("module", "×", "kind", "out×in", "action", "weight error", "output error")
        headers = (*columns, *(["KL in int4"] if measured else []), "smoothed", "because")
        return render(title, headers, cells)


def _span(errors: list[float | None]) -> str:
    """Format a range of errors: `1.2%` or `1.2–3.4%`."""
    known = sorted(error for error in errors if error is not None)
    if not known:
        return ""
    low, high = f"{100 * known[0]:.2f}", f"{100 * known[-1]:.2f}"
    return f"{low}%" if low == high else f"{low}–{high}%"


def _sum(divergences: list[float | None]) -> str:
    """Format the divergences of several layers, which add up, as one."""
    known = [divergence for divergence in divergences if divergence is not None]
    return f"{sum(known):.2g}" if known else ""


_RECORD = "_llmkern_quantized"  # in the `__dict__` of the model that was quantized: it is copied and pickled with it


def record_report(model: nn.Module, report: QuantReport) -> None:
    """Keep the report of a `quantize_` call for `current`; rows of earlier calls stay, but for the same modules."""
    known: QuantReport | None = model.__dict__.get(_RECORD)
    if known is not None:
        now = {row.path for row in report.rows}
        rows = (*(row for row in known.rows if row.path not in now), *report.rows)
        report = replace(report, rows=rows, bytes_before=known.bytes_before)
    model.__dict__[_RECORD] = report


def forget_report(model: nn.Module) -> None:
    """Undo `record_report`."""
    for module in model.modules():
        module.__dict__.pop(_RECORD, None)


def current(model: nn.Module) -> QuantReport | None:
    """Return the report of the model as it is now, or None if nothing in it is or was quantized.

    Errors are those that `quantize_` measured; a model that was loaded has none.
    """
    modules = dict(model.named_modules())
    packed = {path: module for path, module in modules.items() if isinstance(module, QuantizedWeight)}
    recorded = [(path, module.__dict__[_RECORD]) for path, module in modules.items() if _RECORD in module.__dict__]
    if not recorded and not packed:
        return None
    now = tensor_bytes(model)
    if not recorded:
        return QuantReport(tuple(_unmeasured(path, module) for path, module in packed.items()), "nothing", now, now)
    prefix, report = recorded[0]
    rows = tuple(_now(row, prefix, modules) for row in report.rows)
    return replace(report, rows=rows, bytes_after=now)


def _now(row: QuantRow, prefix: str, modules: dict[str, nn.Module]) -> QuantRow:
    path = f"{prefix}.{row.path}".strip(".")
    if f"{path}.base_layer" in modules:  # peft has wrapped it since
        path = f"{path}.base_layer"
    if row.action != "left" and not isinstance(modules.get(path), QuantizedWeight):
        why = "it was written or replaced since (a merged adapter, for one); quantize_ packs it again"
        return replace(row, path=path, action="left", reason=why)
    return replace(row, path=path)


def _unmeasured(path: str, module: QuantizedWeight) -> QuantRow:
    kind = "Embedding" if isinstance(module, QuantizedEmbedding) else "Conv1D" if module.from_conv1d else "Linear"
    action, reason = module.format_name, ""
    if action == "int8":
        w8a8 = isinstance(module, Int8Linear) and module.scheme != "w8a16"
        action, reason = ("int8 w8a8", "") if w8a8 else ("int8 weight-only", "the checkpoint says so")
    return QuantRow(path, kind, module.weight_size, action, None, None, False, reason)


def tensor_bytes(model: nn.Module) -> int:
    """Count the bytes of the model's parameters and buffers, each storage once."""
    sizes = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.numel():
            place = tensor.data_ptr() if tensor.layout is torch.strided else id(tensor)
            stored = tensor.numel() if tensor.layout is torch.strided else tensor.values().numel()
            sizes[place] = stored * tensor.element_size()
    return sum(sizes.values())
