"""Sweeps and their points: what `llmkern/bench/ops/<op>.py` declares, and the calls that it stands for.

A definition has `SWEEPS`.  Where a call does more than read its arguments and write its results once, it has
`work(call, out)`, and where the inputs of `llmkern/why/<op>.py` are not those to time, `build(make, sizes…)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

import llmkern.ops
from llmkern.bench import ops as definitions
from llmkern.discovery import import_children
from llmkern.testing.case import Make, cases
from llmkern.testing.compare import as_list
from llmkern.why import Ghosts, builder, capture, sizes

__all__ = ["Inputs", "Mode", "Point", "Sweep", "Work", "definition", "ops_with_sweeps", "tensor_bytes"]

Mode = Literal["forward", "backward"]


@dataclass(frozen=True)
class Sweep:
    """One line of a plot: a size that varies, and everything that does not.

    title: what it shows.  x: the sizes that take each of `values` (the first names the axis).  sizes: the others.
    options: further arguments of the builder in llmkern/why/<op>.py or of the public function.
    quick: the values of `--quick` on the CPU; none leaves the sweep out.
    quick_on_gpu: whether `--quick` has it on a GPU, where the sweeps that `quick` marks are measured too.
    check: upper limits of sizes at which a call too large for a float64 run is judged instead.
    """

    title: str
    x: tuple[str, ...]
    values: tuple[int, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    modes: tuple[Mode, ...] = ("forward",)
    dtypes: Mapping[str, tuple[torch.dtype, ...]] = field(
        default_factory=lambda: {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
    )
    quick: tuple[int, ...] = ()
    quick_on_gpu: bool = False
    check: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """Bytes that a call has to move, operations that it has to do, and the dtype whose matmul rate bounds them."""

    moved: int
    operations: int = 0
    dtype: str = "float32"


@dataclass
class Inputs:
    """One set of inputs: the public function's arguments, and the call that it dispatches."""

    arguments: dict[str, Any]
    call: dict[str, Any]


class _DeviceMake(Make):
    """Inputs drawn on the device itself, in the dtype wanted: the CPU would take minutes over a large cache."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        super().__init__(dtype, device, seed)
        self._generator = torch.Generator(device).manual_seed(seed)

    def randn(self, *shape: int, scale: float = 1.0, offset: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        wanted = dtype or self.dtype
        values = torch.randn(shape, generator=self._generator, device=self.device, dtype=wanted)
        return values if scale == 1.0 and offset == 0.0 else values.mul_(scale).add_(offset)

    def randint(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator, device=self.device, dtype=dtype)


@dataclass(frozen=True)
class Point:
    """One call of a sweep."""

    op: str
    sweep: Sweep
    value: int
    dtype: torch.dtype
    mode: Mode
    device: torch.device

    @property
    def sizes(self) -> dict[str, int]:
        return {**self.sweep.sizes, **dict.fromkeys(self.sweep.x, self.value)}

    @property
    def x(self) -> dict[str, Any]:
        """Identity of the point within a row."""
        dtype = str(self.dtype).removeprefix("torch.")
        own = {"sweep": self.sweep.title, "x": self.sweep.x[0], "dtype": dtype, "mode": self.mode}
        return own | self.sizes | dict(self.sweep.options)

    def __str__(self) -> str:
        return f"{self.op} {self.sweep.title} {self.sweep.x[0]}={self.value} {self.x['dtype']} {self.mode}"

    @property
    def leaves(self) -> tuple[str, ...]:
        """The arguments whose gradients the backward computes."""
        return cases(self.op)[0].differentiable

    def inputs(self, *, seed: int = 0, reduced: bool = False, ghosts: bool = False) -> Inputs:
        """The inputs of the point.

        reduced: cut down to the sizes at which large points are judged.  ghosts: tensors without memory.
        """
        chosen = self.sizes
        if reduced:
            chosen = {name: min(size, self.sweep.check.get(name, size)) for name, size in chosen.items()}
        function = getattr(llmkern.ops, self.op)
        build = builder(self.op)
        module = definition(self.op)
        extras = {n: v for n, v in self.sweep.options.items() if n in (build.__kwdefaults__ or {})}
        keywords = {n: v for n, v in self.sweep.options.items() if n not in extras}
        make = Ghosts(self.dtype, self.device) if ghosts else _DeviceMake(self.dtype, self.device, seed)
        arguments = getattr(module, "build", build)(make, *[chosen[n] for n in sizes(self.op)], **extras) | keywords
        if self.mode == "backward":
            arguments = {
                name: value.requires_grad_() if name in self.leaves and isinstance(value, Tensor) else value
                for name, value in arguments.items()
            }
        return Inputs(arguments, capture(self.op, function, arguments))

    def work(self, call: Mapping[str, Any], out: Any) -> Work:
        """Return the work of one call; a backward also reads the outputs' gradients and writes the inputs'."""
        forward = getattr(definition(self.op), "work", _moved_once)(call, out)
        if self.mode == "forward":
            return forward
        gradients = tensor_bytes(call[name] for name in self.leaves if isinstance(call[name], Tensor))
        return Work(forward.moved + gradients, 2 * forward.operations, forward.dtype)


def tensor_bytes(values: Any) -> int:
    """Bytes of every tensor among `values`, each counted once."""
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def _moved_once(call: Mapping[str, Any], out: Any) -> Work:
    """Every argument read once, every result written once; arithmetic costs nothing beside it."""
    return Work(tensor_bytes(call.values()) + tensor_bytes(as_list(out)))


def ops_with_sweeps() -> list[str]:
    """The ops that have a definition, in alphabetical order."""
    return [module.__name__.rpartition(".")[2] for module in import_children(definitions.__name__)]


def definition(op: str) -> Any:
    """The module llmkern/bench/ops/<op>.py."""
    if op not in ops_with_sweeps():
        raise ValueError(f"unknown op {op!r}; there are {', '.join(ops_with_sweeps())}")
    return importlib.import_module(f"{definitions.__name__}.{op}")


def points(
    op: str,
    device: torch.device,
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    quick: bool = False,
    shape: Mapping[str, int] | None = None,
) -> list[Point]:
    """The calls to time.  dtypes: in place of the sweeps' own.  quick: few points, forward, in the first dtype.

    shape: sizes that replace the sweeps': one point, with the options of the op's first sweep.
    """
    sweeps: Sequence[Sweep] = definition(op).SWEEPS
    if shape is not None:
        names = sizes(op)
        if set(shape) != set(names) or any(size < 1 for size in shape.values()):
            raise ValueError(f"--shape of {op} is {','.join(names)} as whole numbers of at least 1")
        first = sweeps[0]
        own = Sweep("as asked", (names[0],), (shape[names[0]],), shape, first.options, first.modes, first.dtypes)
        sweeps = [Sweep(**{**vars(own), "quick": own.values, "check": first.check})]
    found = []
    for sweep in sweeps:
        values = _quick_values(sweep, device) if quick else sweep.values
        chosen = dtypes or sweep.dtypes[device.type]
        for dtype in chosen[:1] if quick and dtypes is None else chosen:
            for mode in sweep.modes[:1] if quick and shape is None else sweep.modes:
                found += [Point(op, sweep, value, dtype, mode, device) for value in values]
    return found


def _quick_values(sweep: Sweep, device: torch.device) -> tuple[int, ...]:
    """On the CPU those declared; a GPU, for which they would be too small, gets the middle and the largest value."""
    if device.type == "cpu" or not (sweep.quick or sweep.quick_on_gpu):
        return sweep.quick
    return tuple(dict.fromkeys((sweep.values[len(sweep.values) // 2], sweep.values[-1])))
