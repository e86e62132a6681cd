"""Choose the backend of each call: one rule over declared capabilities, and a sentence for every refusal.

`select` walks an op's implementations (llmkern/registry.py, whose names are here too) in order of priority and takes
the first that nothing speaks against.  The walk is plain Python over module globals, so torch.compile traces it,
guards on what it read, and keeps only the chosen implementation in the graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling

from llmkern._compile import known
from llmkern._form import form_of
from llmkern.checks import PLAIN_TENSORS
from llmkern.config import settings
from llmkern.preference import GivesWay, in_order
from llmkern.registry import (
    OPS,
    Backend,
    Implementation,
    Op,
    backend_named,
    backends,
    capability_of,
    define_op,
    implementation,
    implementations,
    implements,
    needs_grad,
    ops,
    register,
    replace_implementations,
    static_reason,
    tensors_in,
    wrong_device,
)
from llmkern.scoped import assigned
from llmkern.transforms import is_transformed

__all__ = [
    "Backend",
    "GivesWay",
    "Implementation",
    "Recorder",
    "Refused",
    "about",
    "backend_named",
    "backends",
    "decisions",
    "define_op",
    "dispatch",
    "dispatch_to_kernels",
    "forced_backend",
    "implementation",
    "implementations",
    "implements",
    "intercepting",
    "known",
    "ops",
    "record_fallback",
    "record_parts",
    "recording",
    "register",
    "replace_implementations",
    "select",
    "tensors_in",
    "use_backend",
]


class Refused(RuntimeError):
    """No backend may serve the call; the message has one sentence per refusal."""


class Recorder(Protocol):
    """A listener for `recording`."""

    def served(self, op: str, call: dict[str, Any], implementation: Implementation, start: float) -> None:
        """`implementation` has served the call; `start` is time.perf_counter() before it."""

    def fell_back(self, op: str, call: dict[str, Any], to: str, reason: str) -> None:
        """The caller turns to other means (`to`), for the given reason."""


class _State:
    """Process-wide, like torch.backends: torch.compile guards on attributes, not on context variables."""

    forced: str | None = None
    recorder: Recorder | None = None
    interceptor: Callable[[str, dict[str, Any]], Any] | None = None


_REMEMBERED = 512  # forms of call per op
_RECENT = 4  # of these, so many are looked for first

_state = _State()


def _usable(
    op: str, device: torch.device, dtype: torch.dtype, grad: bool, forced: str | None
) -> tuple[Implementation, ...]:
    """The implementations that only a `refuse` function can still rule out, those with the larger priority first."""
    found = []
    for impl in OPS[op].implementations:
        chosen = forced is None or impl.backend.name == forced
        if chosen and static_reason(impl, device, dtype, grad) is None:
            found.append(impl)
    return tuple(found)


def decisions(
    op: str, call: dict[str, Any], *, capability: tuple[int, int] | None = None
) -> list[tuple[Backend, Implementation | None, str | None]]:
    """List every backend, best first, with its implementation of `op` and the reason why it cannot serve the call.

    The sentence is None for those that can: the first of them is the one that `select` takes when none is forced.
    Kernel backends that do not implement the op at all are listed too.
    capability: judge as if the call's device were a GPU of this compute capability and its backends were there.
    """
    found: list[tuple[Backend, Implementation | None, str | None]] = []
    for impl in implementations(op):
        found.append((impl.backend, impl, impl.why_not_on(capability, call)))
    present = {backend.name for backend, _, _ in found}
    device = call[OPS[op].lead].device
    for backend in backends():
        if backend.kernels and backend.name not in present:
            if backend.devices is not None and device.type not in backend.devices:
                reason = wrong_device(backend.devices, device)
            else:
                reason = (None if capability else backend.missing) or f"does not implement {op}"
            found.append((backend, None, reason))
    found.sort(key=lambda entry: -(entry[1].priority if entry[1] else entry[0].priority))
    able = [impl for _, impl, reason in found if impl is not None and reason is None]
    asked = iter(in_order(able, call, capability or capability_of(device)))
    return [entry if entry[2] is not None else ((impl := next(asked)).backend, impl, None) for entry in found]


def select(op: str, call: dict[str, Any]) -> Implementation:
    """The implementation that serves `op(**call)`.

    Raises `Refused` where the forced backend, or under `LLMKERN_STRICT=1` every kernel backend, refuses.
    """
    spec = OPS[op]
    lead = call[spec.lead]
    grad = needs_grad(call)
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
    if not is_compiling() and is_transformed():
        usable = tuple([impl for impl in usable if impl.follows_transforms])
    for impl in in_order(usable, call, capability_of(lead.device)):
        if impl.why_not_call(call, forced is not None) is None:
            if settings.strict and forced is None and not impl.backend.kernels:
                raise Refused(_explain_refusal(op, call, None))
            return impl
    raise Refused(_explain_refusal(op, call, forced))


def _explain_refusal(op: str, call: dict[str, Any], forced: str | None) -> str:
    reasons = [(backend.name, reason) for backend, _, reason in decisions(op, call) if reason is not None]
    if forced is not None:
        backend_named(forced, "LLMKERN_BACKEND")  # `use_backend` has asked already
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
    spec = OPS[op]
    # The form of a list of tensors takes longer to compare than an op that has such lists takes to check its call.
    if spec.lists or is_compiling() or watched or torch.is_grad_enabled() or is_transformed():
        return _dispatch(op, check, call)
    arguments = tuple(call.values())
    served = None
    if spec.recent and _state.forced is None and settings.backend is None and not settings.strict:
        try:
            for tensors, same, others, known_others, run in spec.recent:
                if same(*tensors(arguments)) and others(arguments) in known_others:
                    served = run
                    break
        except TypeError:  # an argument that cannot be hashed
            pass
    return _remembered(spec, check, call, arguments) if served is None else served(*arguments)


def _remembered(spec: Op, check: Callable[..., None] | None, call: dict[str, Any], arguments: tuple[Any, ...]) -> Any:
    """Serve the call by the implementation that served this form of call before."""
    form: list[Any] = [_state.forced, settings.backend, settings.strict]
    for value in arguments:
        if isinstance(value, Tensor):
            if type(value) not in PLAIN_TENSORS:  # a subclass means more than its form says
                return _dispatch(spec.name, check, call)
            form += (value.shape, value.stride(), value.dtype, value.device)
        else:
            form.append(tuple(value) if type(value) is list else value)
    key = tuple(form)
    try:
        fn = spec.served.get(key)
    except TypeError:  # an argument that cannot be hashed: `check` has a sentence for it
        return _dispatch(spec.name, check, call)
    if fn is None:
        if check is not None:
            check(**call)
        fn = select(spec.name, call).fn
        if len(spec.served) >= _REMEMBERED:
            spec.served.clear()
        spec.served[key] = fn
    elif _is_unwatched():
        _promote(spec, tuple(call), arguments, fn)
    return fn(**call)


def _promote(spec: Op, names: tuple[str, ...], arguments: tuple[Any, ...], fn: Callable[..., Any]) -> None:
    """Have `dispatch` look first for calls like this one, whose form came again."""

    def by_name(*values: Any) -> Any:
        return fn(**dict(zip(names, values, strict=True)))

    positional = getattr(fn, "positional", by_name)
    form = form_of(arguments, positional if names == spec.arguments else by_name)
    if form is not None:
        spec.recent = (form, *spec.recent[: _RECENT - 1])


def _dispatch(op: str, check: Callable[..., None] | None, call: dict[str, Any]) -> Any:
    if check is not None:
        check(**call)
    if _state.interceptor is not None:
        return _state.interceptor(op, call)
    return _run(op, call, select(op, call))


def dispatch_to_kernels(
    op: str, call: dict[str, Any], judged: dict[Any, tuple[Any, Implementation]] | None = None, form: Any = None
) -> Any:
    """Run a call whose arguments are known to be right on a kernel backend, or on the one that is forced.

    judged: what the caller keeps between calls, so that calls of one `form` are chosen for once; the form has all that
    a choice may go by which differs between them.
    For callers that have other means: raises `Refused` with the reason where neither serves it.
    """
    if _state.interceptor is not None:
        return _state.interceptor(op, call)
    if judged is None:
        return _run(op, call, _of_kernels(op, call))
    key = (form, _state.forced, settings.backend, settings.strict, settings.batch_invariant)
    known = judged.get(key)
    if known is None or known[0] is not OPS[op].implementations:
        known = judged[key] = OPS[op].implementations, _of_kernels(op, call)
    return _run(op, call, known[1])


def _of_kernels(op: str, call: dict[str, Any]) -> Implementation:
    impl = select(op, call)
    if not impl.backend.kernels and forced_backend() is None:
        others = [other for other in implementations(op) if other.backend.kernels]
        raise Refused(next(filter(None, [other.why_not(**call) for other in others]), f"{op} has no kernel"))
    return impl


def _run(op: str, call: dict[str, Any], impl: Implementation) -> Any:
    recorder = _state.recorder
    if recorder is None:
        return impl.fn(**call)
    start = time.perf_counter()
    result = impl.fn(**call)
    recorder.served(op, call, impl, start)
    return result


def about(op: str, call: dict[str, Any]) -> str:
    """Describe a call beyond its shapes."""
    said = OPS[op].about
    return "" if said is None else said(**call)


def record_fallback(op: str, to: str, reason: str, call: dict[str, Any]) -> None:
    """A caller is about to compute `op` by other means than `dispatch`: to the record, or an error where strict."""
    if settings.strict:
        raise Refused(f"{op}: {reason}, so {to} would serve this call")
    if _state.recorder is not None:
        _state.recorder.fell_back(op, call, to, reason)


def record_parts(op: str, to: str, reason: str, call: dict[str, Any]) -> None:
    """A caller leaves `op` to the ops of its parts, which are dispatched in turn: to the record, never an error."""
    if _state.recorder is not None:
        _state.recorder.fell_back(op, call, to, reason)


def _is_unwatched() -> bool:
    """Return True if only the order of backends decides on a call, and nothing records or intercepts it."""
    return (
        _state.recorder is None
        and _state.interceptor is None
        and _state.forced is None
        and settings.backend is None
        and not settings.strict
    )


def recording(recorder: Recorder) -> AbstractContextManager[None]:
    """Within the block, `recorder` hears of every dispatched call and of every fallback outside the dispatcher."""
    return assigned(_state, recorder=recorder)


def intercepting(interceptor: Callable[[str, dict[str, Any]], Any]) -> AbstractContextManager[None]:
    """Within the block `interceptor(op, call)` answers every call, and no backend is asked."""
    return assigned(_state, interceptor=interceptor)


def use_backend(name: str) -> AbstractContextManager[None]:
    """Within the block every call is served by backend `name`, or raises `Refused` with the reason.

    The setting is process-wide, as torch.backends' flags are.  Unknown names raise `ValueError`.
    """
    backend_named(name)
    return assigned(_state, forced=name)


def forced_backend() -> str | None:
    """Return the backend that `use_backend` or `LLMKERN_BACKEND` forces on every call, or None."""
    return _state.forced if _state.forced is not None else settings.backend
