"""Which backend serves a call: declarations as data, one rule, and a sentence for every refusal.

An op has implementations, each declared with `implements`: backend, device, dtypes, compute capability,
whether it has a backward, and a `refuse` function that looks at the call.  `select` walks them in order of
priority and takes the first that nothing speaks against.  The walk is plain Python over module globals, so
torch.compile traces it, guards on what it read, and keeps only the chosen implementation in the graph.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling

from llmkern.config import settings

__all__ = [
    "Backend",
    "Implementation",
    "Refused",
    "backends",
    "dispatch",
    "implementations",
    "implements",
    "register",
    "select",
    "use_backend",
]


class Refused(RuntimeError):
    """No backend may serve the call; the message has one sentence per refusal."""


@dataclass(frozen=True)
class Backend:
    """A family of implementations.

    name: what `use_backend` and `LLMKERN_BACKEND` take.
    priority: the backend with the larger number is asked first.
    devices: torch device types it serves (None: any).
    kernels: hand-written kernels; False for PyTorch's own operators, whose use counts as a fallback.
    probe: None where the backend can run here, else the sentence why not (asked once, when first needed).
    """

    name: str
    priority: int
    devices: tuple[str, ...] | None = None
    kernels: bool = True
    probe: Callable[[], str | None] = field(default=lambda: None, repr=False, compare=False)

    @property
    def missing(self) -> str | None:
        """None where the backend can run on this machine, else the sentence why not."""
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

    def why_not(self, **call: Any) -> str | None:
        """The sentence why this implementation cannot serve `op(**call)`; None where it can."""
        return self.why_not_on(None, call)

    def why_not_on(self, capability: tuple[int, int] | None, call: dict[str, Any]) -> str | None:
        """As `why_not`, on a GPU of this compute capability; None: on this machine."""
        lead = call[_OPS[self.op].lead]
        reason = _static_reason(self, lead.device, lead.dtype, _needs_grad(call), capability)
        if reason is None and self.refuse is not None:
            reason = self.refuse(**call)
        return reason


@dataclass
class _Op:
    """What the dispatcher knows of an op: its tensor arguments and its implementations, best first."""

    name: str
    lead: str
    differentiable: bool
    implementations: tuple[Implementation, ...] = ()
    # By device, dtype, grad mode and forced backend: a bounded table, however many shapes a server sees.
    usable: dict[tuple[torch.device, torch.dtype, bool, str | None], tuple[Implementation, ...]] = field(
        default_factory=dict
    )
    # By the whole form of a call: who served it.
    served: dict[tuple[Any, ...], Callable[..., Any]] = field(default_factory=dict)


class Recorder(Protocol):
    """What `recording` takes."""

    def served(self, op: str, call: dict[str, Any], implementation: Implementation, start: float) -> None:
        """`implementation` has served the call; `start` is time.perf_counter() before it."""

    def fell_back(self, op: str, call: dict[str, Any], to: str, reason: str) -> None:
        """The caller turns to other means (`to`), for the given reason."""


class _State:
    """Process-wide, like torch.backends: torch.compile guards on attributes, not on context variables."""

    forced: str | None = None
    recorder: Recorder | None = None
    interceptor: Callable[[str, dict[str, Any]], Any] | None = None


_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
_REMEMBERED = 512  # forms of call per op

_BACKENDS: dict[str, Backend] = {}
_OPS: dict[str, _Op] = {}
_state = _State()


@torch.compiler.assume_constant_result
def _missing(name: str) -> str | None:
    return _probe(name)


@functools.cache
def _probe(name: str) -> str | None:
    return _BACKENDS[name].probe()


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _needs_grad(call: dict[str, Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in call.values())


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wrong_device(devices: tuple[str, ...], device: torch.device) -> str:
    return f"runs on {' and '.join(devices)}, not on {device.type}"


def _static_reason(
    impl: Implementation,
    device: torch.device,
    dtype: torch.dtype,
    grad: bool,
    assumed: tuple[int, int] | None = None,
) -> str | None:
    """What speaks against `impl` whatever the shapes are; `assumed`: as on a GPU of that compute capability."""
    if impl.devices is not None and device.type not in impl.devices:
        return _wrong_device(impl.devices, device)
    missing = None if assumed is not None else _missing(impl.backend.name)
    if missing is not None:
        return missing
    if impl.dtypes is not None and dtype not in impl.dtypes:
        return f"takes {', '.join([_dtype_name(d) for d in impl.dtypes])}, not {_dtype_name(dtype)}"
    if impl.min_capability is not None and device.type == "cuda":
        have = _capability(device.index) if assumed is None else assumed
        if have < impl.min_capability:
            need = impl.min_capability
            return f"needs compute capability {need[0]}.{need[1]}, the device has {have[0]}.{have[1]}"
    if grad and not impl.has_backward:
        return "has no backward, and a gradient is needed"
    return None


def _usable(
    op: str, device: torch.device, dtype: torch.dtype, grad: bool, forced: str | None
) -> tuple[Implementation, ...]:
    """The implementations that only a `refuse` function can still rule out, best first."""
    found = []
    for impl in _OPS[op].implementations:
        chosen = forced is None or impl.backend.name == forced
        if chosen and _static_reason(impl, device, dtype, grad) is None:
            found.append(impl)
    return tuple(found)


def decisions(
    op: str, call: dict[str, Any], *, capability: tuple[int, int] | None = None
) -> list[tuple[Backend, Implementation | None, str | None]]:
    """Every backend, best first, with its implementation of `op` and the sentence why it cannot serve the call.

    The sentence is None for those that can: the first of them is the one that `select` takes when none is forced.
    Kernel backends that do not implement the op at all are listed too.
    capability: judge as if the call's device were a GPU of this compute capability and its backends were there.
    """
    found: list[tuple[Backend, Implementation | None, str | None]] = []
    for impl in implementations(op):
        found.append((impl.backend, impl, impl.why_not_on(capability, call)))
    present = {backend.name for backend, _, _ in found}
    device = call[_OPS[op].lead].device
    for backend in backends():
        if backend.kernels and backend.name not in present:
            if backend.devices is not None and device.type not in backend.devices:
                reason = _wrong_device(backend.devices, device)
            else:
                reason = (None if capability else backend.missing) or f"does not implement {op}"
            found.append((backend, None, reason))
    return sorted(found, key=lambda entry: -(entry[1].priority if entry[1] else entry[0].priority))


def select(op: str, call: dict[str, Any]) -> Implementation:
    """The implementation that serves `op(**call)`.

    Raises `Refused` where the forced backend, or under `LLMKERN_STRICT=1` every kernel backend, refuses.
    """
    spec = _OPS[op]
    lead = call[spec.lead]
    grad = _needs_grad(call)
    if grad and not spec.differentiable:
        raise Refused(f"{op} has no gradient: detach its inputs or call it under torch.no_grad()")
    forced = forced_backend()
    if is_compiling():
        usable = _usable(op, lead.device, lead.dtype, grad, forced)
    else:
        key = (lead.device, lead.dtype, grad, forced)
        if key not in spec.usable:
            spec.usable[key] = _usable(op, *key)
        usable = spec.usable[key]
    for impl in usable:
        if impl.refuse is None or impl.refuse(**call) is None:
            if settings.strict and forced is None and not impl.backend.kernels:
                raise Refused(_explain_refusal(op, call, None))
            return impl
    raise Refused(_explain_refusal(op, call, forced))


def _explain_refusal(op: str, call: dict[str, Any], forced: str | None) -> str:
    reasons = [(backend.name, reason) for backend, _, reason in decisions(op, call) if reason is not None]
    if forced is not None:
        backend_named(forced)
        why = "; ".join(reason for name, reason in reasons if name == forced) or f"it does not implement {op}"
        return f"{op}: the forced backend {forced!r} cannot serve this call: {why}"
    kind = "kernel backend" if settings.strict else "backend"
    return f"{op}: no {kind} can serve this call ({'; '.join([f'{name}: {reason}' for name, reason in reasons])})"


def dispatch(op: str, check: Callable[..., None] | None = None, /, **call: Any) -> Any:
    """Run `op` on the backend that `select` picks.  `call` has exactly the arguments of the op's schema.

    check: takes the call's arguments and raises where they are not accepted.  Without gradients, checks and choice
    are made once for each form of call (shapes, strides, dtypes, devices, and every other argument): at batch 1 an op
    runs between matrix products that have emptied the caches, where a handful of small Python functions takes
    longer than the op itself.
    """
    watched = _state.recorder is not None or _state.interceptor is not None
    if watched or torch.is_grad_enabled() or is_compiling():
        return _dispatch(op, check, call)
    form: list[Any] = [_state.forced, settings.backend, settings.strict]
    for value in call.values():
        if type(value) in _PLAIN_TENSORS:
            form += (value.shape, value.stride(), value.dtype, value.device)
        elif isinstance(value, Tensor):  # a subclass means more than its form says
            return _dispatch(op, check, call)
        else:
            form.append(tuple(value) if type(value) is list else value)
    key = tuple(form)
    served = _OPS[op].served
    try:
        fn = served.get(key)
    except TypeError:  # an argument that cannot be hashed: `check` has a sentence for it
        return _dispatch(op, check, call)
    if fn is None:
        if check is not None:
            check(**call)
        fn = select(op, call).fn
        if len(served) >= _REMEMBERED:
            served.clear()
        served[key] = fn
    return fn(**call)


def _dispatch(op: str, check: Callable[..., None] | None, call: dict[str, Any]) -> Any:
    if check is not None:
        check(**call)
    if _state.interceptor is not None:
        return _state.interceptor(op, call)
    impl = select(op, call)
    recorder = _state.recorder
    if recorder is None:
        return impl.fn(**call)
    start = time.perf_counter()
    result = impl.fn(**call)
    recorder.served(op, call, impl, start)
    return result


def record_fallback(op: str, to: str, reason: str, call: dict[str, Any]) -> None:
    """A caller is about to compute `op` by other means than `dispatch`: to the record, or an error where strict."""
    if settings.strict:
        raise Refused(f"{op}: {reason}, so {to} would serve this call")
    if _state.recorder is not None:
        _state.recorder.fell_back(op, call, to, reason)


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Within the block, `recorder` hears of every dispatched call and of every fallback outside the dispatcher."""
    before, _state.recorder = _state.recorder, recorder
    try:
        yield
    finally:
        _state.recorder = before


@contextlib.contextmanager
def intercepting(interceptor: Callable[[str, dict[str, Any]], Any]) -> Iterator[None]:
    """Within the block `interceptor(op, call)` answers every call, and no backend is asked."""
    before, _state.interceptor = _state.interceptor, interceptor
    try:
        yield
    finally:
        _state.interceptor = before


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every call is served by backend `name`, or raises `Refused` with the reason.

    The setting is process-wide, as torch.backends' flags are.  Unknown names raise `ValueError`.
    """
    backend_named(name)
    before, _state.forced = _state.forced, name
    try:
        yield
    finally:
        _state.forced = before


def forced_backend() -> str | None:
    """The backend that `use_backend` or `LLMKERN_BACKEND` forces on every call; None where the order decides."""
    return _state.forced if _state.forced is not None else settings.backend


def backend_named(name: str) -> Backend:
    """The registered backend called `name`; `ValueError` lists what there is."""
    if name not in _BACKENDS:
        known = ", ".join(b.name for b in backends())
        raise ValueError(f"unknown backend {name!r}; there are {known}")
    return _BACKENDS[name]


def define_op(name: str, *, lead: str, differentiable: bool) -> None:
    """Make an op known; `lead` names the tensor argument whose device and dtype decide."""
    if name in _OPS:
        raise ValueError(f"op {name!r} is defined already")
    _OPS[name] = _Op(name, lead, differentiable)


def backends() -> tuple[Backend, ...]:
    """Every registered backend, best first."""
    return tuple(sorted(_BACKENDS.values(), key=lambda b: -b.priority))


def ops() -> tuple[str, ...]:
    """Names of all ops, backward ones included, in alphabetical order."""
    return tuple(sorted(_OPS))


def implementations(op: str) -> tuple[Implementation, ...]:
    """The implementations of `op`, best first."""
    if op not in _OPS:
        raise ValueError(f"unknown op {op!r}; there are {', '.join(ops())}")
    return _OPS[op].implementations


def implementation(op: str, backend: str) -> Implementation:
    """The implementation of `op` by `backend` (the best one, if it has several)."""
    for impl in implementations(op):
        if impl.backend.name == backend:
            return impl
    raise ValueError(f"backend {backend!r} does not implement {op}")


def replace_implementations(op: str, implementations: Sequence[Implementation]) -> None:
    """Give `op` these implementations and no others; what was decided before is forgotten."""
    spec = _OPS[op]
    spec.implementations = tuple(sorted(implementations, key=lambda i: -i.priority))
    spec.usable.clear()
    spec.served.clear()


def register(
    name: str,
    *,
    priority: int = 500,
    devices: Sequence[str] | None = None,
    kernels: bool = True,
    missing: Callable[[], str | None] | None = None,
) -> Backend:
    """Add a backend, from inside or outside the package; give it to `implements`.

    `missing` is asked once, when first needed: None where the backend can run here, else the sentence why not.
    Priorities of the built-in ones: cuda 400, triton 300, cpu 200, torch 100, reference 0.
    """
    if name in _BACKENDS:
        raise ValueError(f"backend {name!r} is registered already")
    backend = Backend(
        name, priority, tuple(devices) if devices is not None else None, kernels, missing or (lambda: None)
    )
    _BACKENDS[name] = backend
    return backend


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
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare the decorated function as `backend`'s implementation of `op`.

    The function takes exactly the arguments of the op's schema, by keyword, after the public function's checks.
    device: device types (default: the backend's).  dtypes: of the op's first tensor (default: any).
    min_capability: of a CUDA device.  has_backward: gradients flow through the result.
    priority: refines the order among implementations; added to the backend's.
    refuse: takes the call's arguments by keyword, returns the sentence why this one cannot be served, or None.
        It may look at shapes, strides, dtypes, devices and plain arguments, never at contents or addresses: `dispatch`
        remembers the choice for every call of the same form.
    """
    if isinstance(backend, str):
        backend = backend_named(backend)
    if op not in _OPS:
        raise ValueError(f"unknown op {op!r}; define it first (llmkern/ops), or choose from {', '.join(ops())}")
    devices = (device,) if isinstance(device, str) else tuple(device) if device is not None else backend.devices

    def declare(fn: Callable[..., Any]) -> Callable[..., Any]:
        impl = Implementation(
            op,
            backend,
            fn,
            devices,
            tuple(dtypes) if dtypes is not None else None,
            min_capability,
            has_backward,
            backend.priority + priority,
            refuse,
        )
        spec = _OPS[op]
        replace_implementations(op, (*spec.implementations, impl))
        return fn

    return declare
