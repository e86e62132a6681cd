"""`explain`: which backend served each op of one forward, and why each better one was refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkern import dispatch
from llmkern.checks import shape_text
from llmkern.table import collapse, render

__all__ = ["Explanation", "ExplainRow", "explain"]


@dataclass(frozen=True)
class ExplainRow:
    """One op call.

    site: path of the innermost module that made it.  shapes: of the tensor arguments, by name.
    dtype: of the op's first tensor.  backend: the one that served the call, or the transformers function that did.
    refused: (backend, sentence) for each better one, and for the one that served it where it had to copy arguments
    first.  milliseconds: wall time, the device synchronised.
    batch_invariant: whether the backend promises that a row's bits do not depend on the rows beside it.
    source: the file of what served it, seen from the root of the repository; "" where that is not an op of ours.
    about: what there is to say of the call besides its shapes: the programs of `layers_`, a kernel's tiles or blocks.
    """

    site: str
    op: str
    shapes: dict[str, tuple[int, ...]]
    dtype: str
    backend: str
    refused: tuple[tuple[str, str], ...]
    milliseconds: float | None
    batch_invariant: bool = False
    source: str = ""
    about: str = ""


@dataclass(frozen=True)
class Explanation:
    """The op calls of one forward, in order; prints as a table in which repeated layers take one line."""

    rows: tuple[ExplainRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """`{"rows": [{"site", "op", "shapes", "dtype", "backend", "refused", "milliseconds",
        "batch_invariant", "source", "about"}]}`."""
        return {"rows": [asdict(row) for row in self.rows]}

    def __iter__(self) -> Iterator[ExplainRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        notes: dict[tuple[str, str], int] = {}
        described = []
        for row in self.rows:
            shapes = " ".join([f"{name}{shape_text(shape)}" for name, shape in row.shapes.items()])
            refused = ", ".join([f"{r[0]} [{notes.setdefault(r, len(notes) + 1)}]" for r in row.refused])
            described.append((row.site, (row.op, shapes, row.dtype, row.backend, refused)))
        cells = []
        for site, count, (*call, refused), members in collapse(described):
            spent = [t for i in members if (t := self.rows[i].milliseconds) is not None]
            cells.append((site, count, *call, f"{sum(spent):.3f}" if spent else "", refused))
        headers = ("module", "×", "op", "shapes", "dtype", "served by", "ms", "refused")
        table = render(f"{len(self.rows)} op calls", headers, cells)
        footnotes = [f"[{i}] {name}: {sentence}" for (name, sentence), i in notes.items()]
        varying = dict.fromkeys([f"{row.op} on {row.backend}" for row in self.rows if not row.batch_invariant])
        if varying:
            footnotes.append(f"a row's bits may depend on the rows beside it: {', '.join(varying)}")
        sources = dict.fromkeys([f"{row.op} on {row.backend}: {row.source}" for row in self.rows if row.source])
        if sources:
            footnotes.append(f"served by {', '.join(sources)}")
        footnotes += dict.fromkeys([row.about for row in self.rows if row.about])
        return "\n".join([table, *footnotes])


class _Collector:
    """Hears of every call while `explain` runs, and knows which module is running."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[ExplainRow] = []
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._stack: list[str] = []

    def served(self, op: str, call: dict[str, Any], implementation: dispatch.Implementation, start: float) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        elapsed = (time.perf_counter() - start) * 1e3
        refused = []
        for backend, candidate, reason in dispatch.decisions(op, call):
            if candidate is implementation:
                break
            refused.append((backend.name, reason or "another backend is forced"))
        if implementation.copies is not None and (copied := implementation.copies(**call)) is not None:
            refused.append((implementation.backend.name, copied))
        launched = "" if implementation.describe is None else implementation.describe(None, **call)
        about = "\n".join(filter(None, (dispatch.about(op, call), launched)))
        alone = implementation.keeps_rows_alone
        self._add(op, call, implementation.backend.name, tuple(refused), elapsed, alone, implementation.source, about)

    def fell_back(self, op: str, call: dict[str, Any], to: str, reason: str) -> None:
        self._add(op, call, to, (("llmkern", reason),), None)

    def _add(
        self,
        op: str,
        call: dict[str, Any],
        backend: str,
        refused: tuple[tuple[str, str], ...],
        elapsed: float | None,
        batch_invariant: bool = False,
        source: str = "",
        about: str = "",
    ) -> None:
        tensors = {name: value for name, value in call.items() if isinstance(value, Tensor)}
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        site = self._stack[-1] if self._stack else ""
        self.rows.append(ExplainRow(site, op, shapes, dtype, backend, refused, elapsed, batch_invariant, source, about))

    @contextmanager
    def watching_modules(self) -> Iterator[None]:
        def enter(module: nn.Module, _args: Any) -> None:
            if id(module) in self._paths:
                self._stack.append(self._paths[id(module)])

        def leave(module: nn.Module, _args: Any, _out: Any) -> None:
            if id(module) in self._paths:
                self._stack.pop()

        hooks = (
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def explain(model: nn.Module, *args: Any, **inputs: Any) -> Explanation:
    """Run `model(*args, **inputs)` once and tell, for every op call, who served it and why nobody better did.

    Gradient mode, train/eval and the model are left as they are; compiled models run eagerly for this one forward.
    Ops are found where they are called: in an optimized model, or in any module that calls llmkern.ops.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: model is a {type(model).__name__}, expected a torch.nn.Module")
    collector = _Collector(model)
    with torch.compiler.set_stance("force_eager"), collector.watching_modules(), dispatch.recording(collector):
        model(*args, **inputs)
    return Explanation(tuple(collector.rows))
