"""The registry of backends, ops, and each backend's implementations of them, declared as data.

An op has implementations, each declared with `implements`: backend, device, dtypes, compute capability, whether it has
a backward, and a `refuse` function that looks at the call.  llmkern/dispatch.py has the rule that chooses.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling

from llmkern._compile import constant_result
from llmkern._form import Form
from llmkern.config import settings
from llmkern.kernel_files import kernel_file
from llmkern.preference import GivesWay
from llmkern.transforms import why_transformed

__all__ = [
    "OPS",
    "Backend",
    "Implementation",
    "RowsAlone",
    "backend_named",
    "backends",
    "capability_of",
    "define_op",
    "forget",
    "implementation",
    "implementations",
    "implements",
    "needs_grad",
    "ops",
    "register",
    "replace_implementations",
    "static_reason",
    "tensors_in",
    "wrong_device",
]


RowsAlone = Literal["always", "on request", "no"]
"""Batch invariance as an implementation promises it; `implements` says what it is."""


@dataclass(frozen=True)
class Backend:
    """A family of implementations.

    name: what `use_backend` and `LLMKERN_BACKEND` take.
    priority: the backend with the larger number is asked first.
    devices: torch device types it serves (None: any).
    kernels: hand-written kernels; False for PyTorch's own operators, whose use counts as a fallback.
    probe: returns why the backend cannot run here, or None (asked once, when first needed).
    note: what `llmkern info` says of it besides.
    """

    name: str
    priority: int
    devices: tuple[str, ...] | None = None
    kernels: bool = True
    probe: Callable[[], str | None] = field(default=lambda: None, repr=False, compare=False)
    note: str = ""

    @property
    def missing(self) -> str | None:
        """Return why the backend cannot run on this machine, or None."""
        return _missing(self.name)


@dataclass(frozen=True)
class Implementation:
    """One backend's way to compute one op, with everything that decides whether it may serve a call."""

    op: str
    backend: Backend
    fn: Callable[..., Any] = field(repr=False)
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...] | None
    min_capability: tuple[int, int] | None
    has_backward: bool
    priority: int
    refuse: Callable[..., str | None] | None = field(repr=False)
    describe: Callable[..., str] | None = field(default=None, repr=False)
    slower: Callable[..., str | None] | None = field(default=None, repr=False)
    rows_alone: RowsAlone = "no"
    copies: Callable[..., str | None] | None = field(default=None, repr=False)
    gives_way: GivesWay | None = field(default=None, repr=False)

    @property
    def follows_transforms(self) -> bool:
        """True if forward-mode AD and torch.func's transforms see everything it computes: it is plain torch."""
        return self.backend.name == "reference"

    @property
    def source(self) -> str:
        """Source file of the kernel or Python function that computes it, relative to the repository's root."""
        kernel = getattr(self.fn, "kernel", None)
        if kernel is not None:
            return kernel_file(kernel, self.backend.name)
        code: Any = getattr(inspect.unwrap(self.fn), "__code__", None)
        return "" if code is None else "llmkern/" + code.co_filename.rpartition("/llmkern/")[2]

    def why_not(self, **call: Any) -> str | None:
        """Return why this implementation cannot serve `op(**call)`, or None."""
        return self.why_not_on(None, call)

    def why_not_on(self, capability: tuple[int, int] | None, call: dict[str, Any]) -> str | None:
        """Like `why_not`, on a GPU of this compute capability; None: on this machine."""
        lead = call[OPS[self.op].lead]
        reason = static_reason(self, lead.device, lead.dtype, needs_grad(call), capability)
        if reason is None and not self.follows_transforms and not is_compiling():
            reason = why_transformed()
        return self.why_not_call(call) if reason is None else reason

    @property
    def keeps_rows_alone(self) -> bool:
        """True if a row's bits depend, under the current settings, on nothing beside the row."""
        return self.rows_alone == "always" or (self.rows_alone == "on request" and settings.batch_invariant)

    def why_not_call(self, call: dict[str, Any], forced: bool = False) -> str | None:
        """Like `why_not`, once device, dtype and gradients are accepted; forced: ignore measured slowness."""
        if settings.batch_invariant and self.rows_alone == "no":
            return "a row's bits may depend on the rows beside it, which LLMKERN_BATCH_INVARIANT=1 forbids"
        reason = None if self.refuse is None else self.refuse(**call)
        if reason is None and self.slower is not None and not forced and not settings.batch_invariant:
            reason = self.slower(**call)
        return reason


@dataclass
class Op:
    """The dispatcher's record of an op: its arguments and its implementations, best first.

    lists: some arguments are lists of tensors.  about: what there is to say of a call besides its shapes.
    """

    name: str
    arguments: tuple[str, ...]
    differentiable: bool
    lists: bool
    about: Callable[..., str] | None = None
    implementations: tuple[Implementation, ...] = ()
    # By device, dtype, grad mode and forced backend: a bounded table, however many shapes a server sees.
    usable: dict[tuple[torch.device, torch.dtype, bool, str | None], tuple[Implementation, ...]] = field(
        default_factory=dict
    )
    # By the whole form of a call: who served it.
    served: dict[tuple[Any, ...], Callable[..., Any]] = field(default_factory=dict)
    # Forms that came again, the latest first.
    recent: tuple[Form, ...] = ()

    @property
    def lead(self) -> str:
        """The tensor argument whose device and dtype decide: the first."""
        return self.arguments[0]

    def forget(self) -> None:
        """Decide anew on every call."""
        self.usable.clear()
        self.served.clear()
        self.recent = ()


_BACKENDS: dict[str, Backend] = {}
OPS: dict[str, Op] = {}
"""Every op by its name."""


@constant_result
def _missing(name: str) -> str | None:
    return _probe(name)


@functools.cache
def _probe(name: str) -> str | None:
    return _BACKENDS[name].probe()


@constant_result
def _capability(index: int | None) -> tuple[int, int] | None:
    """Return the compute capability, or None without a GPU: Triton's interpreter, for one, runs all the same."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Return a GPU's compute capability; None for other devices, and where torch finds no GPU."""
    return _capability(device.index) if device.type == "cuda" else None


def needs_grad(call: dict[str, Any]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in(call.values()))


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among a call's arguments, those in lists too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list):
            yield from (tensor for tensor in value if isinstance(tensor, Tensor))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def wrong_device(devices: tuple[str, ...], device: torch.device) -> str:
    return f"runs on {' and '.join(devices)}, not on {device.type}"


def static_reason(
    impl: Implementation,
    device: torch.device,
    dtype: torch.dtype,
    grad: bool,
    assumed: tuple[int, int] | None = None,
) -> str | None:
    """Return why `impl` cannot serve any shapes, or None; `assumed`: as on a GPU of that compute capability."""
    if impl.devices is not None and device.type not in impl.devices:
        return wrong_device(impl.devices, device)
    missing = None if assumed is not None else _missing(impl.backend.name)
    if missing is not None:
        return missing
    if impl.dtypes is not None and dtype not in impl.dtypes:
        return f"takes {', '.join([_dtype_name(d) for d in impl.dtypes])}, not {_dtype_name(dtype)}"
    if impl.min_capability is not None and device.type == "cuda":
        have = _capability(device.index) if assumed is None else assumed
        if have is None:
            return "torch finds no GPU here"
        if have < impl.min_capability:
            need = impl.min_capability
            return f"needs compute capability {need[0]}.{need[1]}, the device has {have[0]}.{have[1]}"
    if grad and not impl.has_backward:
        return "has no backward, and a gradient is needed"
    return None


def backend_named(name: str, setting: str = "") -> Backend:
    """The registered backend called `name`; `ValueError` lists what there is, and names the setting it is from."""
    if name not in _BACKENDS:
        known = ", ".join(b.name for b in backends())
        raise ValueError(f"{setting and f'{setting}: '}unknown backend {name!r}; there are {known}")
    return _BACKENDS[name]


def define_op(
    name: str,
    arguments: Sequence[str],
    *,
    differentiable: bool,
    lists: bool = False,
    about: Callable[..., str] | None = None,
) -> None:
    """Make an op with these arguments known; the first is a tensor, whose device and dtype decide.

    about: as of `llmkern.library.define`."""
    if name in OPS:
        raise ValueError(f"op {name!r} is defined already")
    OPS[name] = Op(name, tuple(arguments), differentiable, lists, about)


def backends() -> tuple[Backend, ...]:
    """Every registered backend, best first."""
    return tuple(sorted(_BACKENDS.values(), key=lambda b: -b.priority))


def ops() -> tuple[str, ...]:
    """Names of all ops, backward ones included, in alphabetical order."""
    return tuple(sorted(OPS))


def implementations(op: str) -> tuple[Implementation, ...]:
    """The implementations of `op`, best first."""
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; there are {', '.join(ops())}")
    return OPS[op].implementations


def implementation(op: str, backend: str) -> Implementation:
    """The implementation of `op` by `backend` (the best one, if it has several)."""
    for impl in implementations(op):
        if impl.backend.name == backend:
            return impl
    raise ValueError(f"backend {backend!r} does not implement {op}")


def forget() -> None:
    """Decide anew on every call: what implementations say of themselves may have changed."""
    for op in OPS.values():
        op.forget()


def replace_implementations(op: str, implementations: Sequence[Implementation]) -> None:
    """Give `op` these implementations and no others; what was decided before is forgotten."""
    spec = OPS[op]
    spec.implementations = tuple(sorted(implementations, key=lambda i: -i.priority))
    spec.forget()


def register(
    name: str,
    *,
    priority: int = 500,
    devices: Sequence[str] | None = None,
    kernels: bool = True,
    missing: Callable[[], str | None] | None = None,
    note: str = "",
) -> Backend:
    """Add a backend, from inside or outside the package; give it to `implements`.

    `missing` is asked once, when first needed, and returns why the backend cannot run here, or None.
    `note` is shown by `llmkern info`.
    Priorities of the built-in ones: cuda 400, triton 300, tpu 250, cpu 200, torch 100, reference 0.
    """
    if name in _BACKENDS:
        raise ValueError(f"backend {name!r} is registered already")
    backend = Backend(
        name, priority, tuple(devices) if devices is not None else None, kernels, missing or (lambda: None), note
    )
    _BACKENDS[name] = backend
    return backend


def _with_arguments(fn: Callable[..., Any], for_gradient: Mapping[str, Any]) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        return fn(**({**arguments, **for_gradient} if needs_grad(arguments) else arguments))

    call.kernel = getattr(fn, "kernel", None)  # type: ignore[attr-defined]
    return call


def implements(
    op: str,
    backend: Backend | str,
    *,
    device: str | Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    min_capability: tuple[int, int] | None = None,
    has_backward: bool = False,
    priority: int = 0,
    refuse: Callable[..., str | None] | None = None,
    describe: Callable[..., str] | None = None,
    slower: Callable[..., str | None] | None = None,
    rows_alone: RowsAlone = "no",
    for_gradient: Mapping[str, Any] | None = None,
    copies: Callable[..., str | None] | None = None,
    gives_way: GivesWay | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare the decorated function as `backend`'s implementation of `op`.

    The function takes exactly the arguments of the op's schema, by keyword, after the public function's checks.
    device: device types (default: the backend's).  dtypes: of the op's first tensor (default: any).
    min_capability: of a CUDA device.  has_backward: gradients flow through the result.
    priority: refines the order among implementations; added to the backend's.
    refuse: takes the call's arguments by keyword, returns why this call cannot be served, or None.
        It may look at shapes, strides, dtypes, devices and plain arguments, never at contents or addresses: `dispatch`
        remembers the choice for every call of the same form.
    slower: takes the call's arguments by keyword, returns the sentence that a backend asked later was measured to be
        faster, or None.  It decides among backends that all compute the same; a forced backend is not asked.  Sizes
        are compared by `known`, so that what torch.compile and torch.export trace holds for any size.
    rows_alone: whether a row (a batch element of attention and of whole layers) has the bits that it has alone,
        whatever rows are beside it and however many: "always", "on request" (LLMKERN_BATCH_INVARIANT=1) or "no".
    describe: takes a compute capability (None: of the call's device) and the call's arguments by keyword, returns in
        words what would run, for `llmkern why`.
    copies: takes the call's arguments by keyword, returns the sentence what this implementation copies before it
        computes, or None, for `explain`.  Unlike `refuse` it may look at addresses: it decides nothing.
    gives_way: GPUs and calls for which another backend that could serve them is asked first.
    for_gradient: arguments that take the place of the call's where a gradient is needed, so that the forward keeps
        what the backward reads.
    """
    if isinstance(backend, str):
        backend = backend_named(backend)
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; define it first (llmkern/ops), or choose from {', '.join(ops())}")
    devices = (device,) if isinstance(device, str) else tuple(device) if device is not None else backend.devices

    def declare(fn: Callable[..., Any]) -> Callable[..., Any]:
        impl = Implementation(
            op,
            backend,
            fn if for_gradient is None else _with_arguments(fn, for_gradient),
            devices,
            tuple(dtypes) if dtypes is not None else None,
            min_capability,
            has_backward,
            backend.priority + priority,
            refuse,
            describe,
            slower,
            rows_alone,
            copies,
            gives_way,
        )
        spec = OPS[op]
        replace_implementations(op, (*spec.implementations, impl))
        return fn

    return declare
