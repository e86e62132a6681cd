"""The dispatcher's decision for one call, without running it: what `llmkern why` prints.

Each module `<op>.py` of this folder holds `build(make, <sizes>, *, <extras>)`, which returns the arguments of the
op's public function as `make` makes them: `make.randn(*shape)`, `make.randint(low, high, *shape, dtype=)` and
`make.tensor(values, dtype=)`, as in `llmkern.testing.case.Make`.  The sizes' names are the meaning of `--shape`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import llmkern.ops
from llmkern import dispatch
from llmkern.backends.tpu import DEVICE as TPU_DEVICE
from llmkern.backends.tpu import NOTE as TPU_NOTE
from llmkern.checks import shape_text
from llmkern.config import settings
from llmkern.discovery import import_children
from llmkern.jax import assume
from llmkern.registry import capability_of
from llmkern.table import render

__all__ = ["Decision", "Ghosts", "Row", "builder", "capture", "ops", "sizes", "why"]


@dataclass(frozen=True)
class Row:
    """One implementation: "chosen" (with what would run, where that is known), "refused" (with the reason), or "able"
    (a better one was chosen)."""

    backend: str
    outcome: Literal["chosen", "refused", "able"]
    reason: str


@dataclass(frozen=True)
class Decision:
    """Answer of `why`.  `served_by`: the backend, or None; `note`: what was assumed."""

    op: str
    call: str
    served_by: str | None
    rows: tuple[Row, ...]
    note: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        cells = [(row.backend, row.outcome, row.reason) for row in self.rows]
        table = render("", ("backend", "outcome", "because"), cells)
        return "\n".join([f"{self.op}({self.call})", table, *([self.note] if self.note else [])])


class Ghosts:
    """`Make` for tensors that have a device, a dtype and strides but no memory, so that no such device is needed."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.dtype, self.device = dtype, device
        self._mode = FakeTensorMode()

    def randn(self, *shape: int, scale: float = 1.0, offset: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        return self._ghost(torch.empty(shape, dtype=dtype or self.dtype, device="meta"))

    def randint(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        return self._ghost(torch.empty(shape, dtype=dtype, device="meta"))

    def tensor(self, values: Any, dtype: torch.dtype | None = None) -> Tensor:
        return self._ghost(torch.tensor(values, dtype=dtype or self.dtype, device="meta"))

    def _ghost(self, shape_only: Tensor) -> Tensor:
        from torch._subclasses.fake_tensor import FakeTensor

        with self._mode:
            return FakeTensor(self._mode, shape_only, self.device)


def ops() -> list[str]:
    """The ops that `why` knows, in alphabetical order."""
    return [module.__name__.rpartition(".")[2] for module in import_children(__name__)]


def builder(op: str) -> Callable[..., dict[str, Any]]:
    """`build` of llmkern/why/<op>.py."""
    if op not in ops():
        raise ValueError(f"unknown op {op!r}; there are {', '.join(ops())}")
    return importlib.import_module(f"{__name__}.{op}").build


def sizes(op: str) -> list[str]:
    """Return the meaning of the numbers of `--shape` for `op`."""
    return [
        p.name
        for p in list(inspect.signature(builder(op)).parameters.values())[1:]
        if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]


def why(
    op: str,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    capability: tuple[int, int] | None = None,
    chip: str | None = None,
    grad: bool = False,
    arguments: Mapping[str, str] | None = None,
) -> Decision:
    """Tell which backend would serve `op` for tensors of these sizes, and why not the others.

    shape: the numbers that `sizes(op)` names.  dtype: of the op's floating inputs.
    device: "cpu", "cuda" or "tpu"; the machine need not have it.
    capability: judge as on a GPU of this compute capability, such as (9, 0), with all its backends there.
    chip: judge as on a TPU of this kind, such as "v5e".
    grad: as if a gradient were needed.
    arguments: further arguments of the op's public function, as text: {"causal": "true", "window": "128"}.
    Raises ValueError or TypeError with one line where an argument is not accepted.
    """
    build = builder(op)
    place = _device(device)
    if capability is not None and place.type != "cuda":
        raise ValueError(f"why: capability is for cuda devices, device is {place}")
    if chip is not None and place.type != TPU_DEVICE:
        raise ValueError(f"why: chip is for device tpu, device is {place}")
    names = sizes(op)
    if len(shape) != len(names) or any(size < 0 for size in shape):
        raise ValueError(f"why: shape of {op} is {','.join(names)}, got {','.join(map(str, shape)) or 'nothing'}")
    function = getattr(llmkern.ops, op)
    extras, keywords = _split(op, build, function, arguments or {})
    make = Ghosts(dtype, place)
    call = capture(op, function, build(make, *shape, **extras) | keywords)
    if grad:
        call = {
            k: v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in call.items()
        }
    with contextlib.nullcontext() if chip is None else assume(chip):
        rows = _rows(op, call, capability)
    served_by = next((row.backend for row in rows if row.outcome == "chosen"), None)
    return Decision(op, _text(call), served_by, rows, _note(place, capability, chip))


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(TPU_DEVICE if device == "tpu" else device)
    except RuntimeError:
        place = torch.device("meta")
    if place.type not in ("cpu", "cuda", TPU_DEVICE):
        raise ValueError(f"why: device is {str(device)!r}, expected cpu, cuda or tpu")
    return place


def _split(
    op: str, build: Callable[..., Any], function: Callable[..., Any], arguments: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that the builder takes, and those of the public function, as values."""
    extras = {n for n, p in inspect.signature(build).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    hints = typing.get_type_hints(function)
    tensors = {name for name, hint in hints.items() if Tensor in _options(hint)}
    plain = [name for name in inspect.signature(function).parameters if name not in tensors]
    chosen: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, text in arguments.items():
        if name in extras:
            chosen[0][name] = _parse(name, text, typing.get_type_hints(build)[name])
        elif name in plain:
            chosen[1][name] = _parse(name, text, hints[name])
        else:
            raise ValueError(f"why: {op} has no argument {name!r}; there are {', '.join(sorted(extras) + plain)}")
    return chosen


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _parse(name: str, text: str, hint: Any) -> Any:
    """`text` as the first of the hint's types that takes it."""
    accepted = []
    for option in _options(hint):
        origin = typing.get_origin(option) or option
        if option is type(None):
            if text.lower() == "none":
                return None
            accepted.append("none")
        elif option is bool:
            if text.lower() in ("true", "false"):
                return text.lower() == "true"
            accepted.append("true or false")
        elif option in (int, float):
            try:
                return option(text)
            except ValueError:
                accepted.append("a whole number" if option is int else "a number")
        elif option is torch.dtype:
            value = getattr(torch, text, None)
            if isinstance(value, torch.dtype):
                return value
            accepted.append("a dtype such as bfloat16")
        elif isinstance(origin, type) and issubclass(origin, Sequence) and origin is not str:
            try:
                return [int(part) for part in text.split(",")]
            except ValueError:
                accepted.append("whole numbers such as 128,0")
        else:
            return text
    raise ValueError(f"why: {name} is {text!r}, expected {' or '.join(accepted)}")


class _Captured(Exception):
    def __init__(self, call: dict[str, Any]) -> None:
        super().__init__("the call was captured")
        self.call = call


def capture(op: str, function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The call that the public function would dispatch, after its own checks."""

    def interceptor(name: str, call: dict[str, Any]) -> Any:
        if name != op:
            raise AssertionError(f"{op} dispatches {name} first: give it a case of its own in llmkern/why")
        raise _Captured(call)

    try:
        with dispatch.intercepting(interceptor):
            function(**arguments)
    except _Captured as captured:
        return captured.call
    raise AssertionError(f"{op} returned without a dispatched call")


def _rows(op: str, call: dict[str, Any], capability: tuple[int, int] | None) -> tuple[Row, ...]:
    forced = dispatch.forced_backend()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a refusal may ask for a tensor's address; a ghost's is 0, with a warning
        judged = dispatch.decisions(op, call, capability=capability)
    rows: list[Row] = []
    chosen = False
    for backend, implementation, reason in _one_each(judged, call):
        if reason is None and forced is not None and backend.name != forced:
            reason = f"another backend is forced: {forced}"
        if reason is None and forced is None and settings.strict and not backend.kernels:
            reason = "not a kernel backend, and strict forbids falling back"
        if reason is not None:
            rows.append(Row(backend.name, "refused", reason))
        else:
            because = (
                _passed_over(implementation, call, capability)
                if chosen
                else _description(implementation, call, capability)
            )
            rows.append(Row(backend.name, "able" if chosen else "chosen", because))
            chosen = True
    return tuple(_merged(backend, rows) for backend in dict.fromkeys(row.backend for row in rows))


def _passed_over(
    implementation: dispatch.Implementation | None, call: dict[str, Any], capability: tuple[int, int] | None
) -> str:
    """Why an implementation that could serve the call does not."""
    way = implementation.gives_way if implementation is not None else None
    if way is not None and way.applies(call, capability or capability_of(call[next(iter(call))].device)):
        return f"gives way to {way.to}: {way.because}"
    return "a better one serves the call"


def _merged(backend: str, rows: list[Row]) -> Row:
    """One row for a backend with several implementations: the one that can serve the call, or all reasons."""
    own = [row for row in rows if row.backend == backend]
    served = next((row for row in own if row.outcome != "refused"), None)
    return served or Row(backend, "refused", "; ".join(dict.fromkeys(row.reason for row in own)))


def _one_each(
    judged: list[tuple[dispatch.Backend, dispatch.Implementation | None, str | None]], call: dict[str, Any]
) -> list[tuple[dispatch.Backend, dispatch.Implementation | None, str | None]]:
    """Choose for each backend the implementation that can serve the call, else the best for its device."""
    device = next(value for value in call.values() if isinstance(value, Tensor)).device

    def worth(entry: tuple[dispatch.Backend, dispatch.Implementation | None, str | None]) -> tuple[bool, bool]:
        _, implementation, reason = entry
        devices = implementation.devices if implementation is not None else None
        return reason is None, devices is None or device.type in devices

    best: dict[str, tuple[dispatch.Backend, dispatch.Implementation | None, str | None]] = {}
    for entry in judged:
        other = best.get(entry[0].name)
        if other is None or worth(entry) > worth(other):
            best[entry[0].name] = entry
    return [entry for entry in judged if best[entry[0].name] is entry]


def _description(
    implementation: dispatch.Implementation | None, call: dict[str, Any], capability: tuple[int, int] | None
) -> str:
    """Describe the kernel that would run, if the implementation can tell."""
    if implementation is None or implementation.describe is None:
        return ""
    return implementation.describe(capability, **call)


def _text(call: dict[str, Any]) -> str:
    """The call in one line; arguments that are None are left out."""
    parts = []
    for name, value in call.items():
        if isinstance(value, Tensor):
            parts.append(f"{name}: {str(value.dtype).removeprefix('torch.')}{shape_text(value.shape)}")
        elif isinstance(value, list) and any([isinstance(each, Tensor) for each in value]):
            parts.append(f"{name}: {sum([each is not None for each in value])} tensors")
        elif isinstance(value, list) and value and all([isinstance(each, str) for each in value]):
            parts.append(f"{name}: {len(value)}")
        elif value is not None and value != []:
            parts.append(f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}")
    return ", ".join(parts)


def _note(device: torch.device, capability: tuple[int, int] | None, chip: str | None) -> str:
    if chip is not None:
        return f"as decided on a TPU {chip}; its kernels are {TPU_NOTE}"
    if capability is not None:
        return f"as decided on a GPU of compute capability {capability[0]}.{capability[1]} with all its backends built"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "this machine has no CUDA device; ask with --capability what one would do"
    return ""
