"""Turn a function of `llmkern.jax` into an implementation: arrays in place of tensors, refusals, and its plans."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from llmkern.backends.tpu import DEVICE, TPU
from llmkern.dispatch import forced_backend, implements
from llmkern.jax import _chips
from llmkern.jax._plan import Plan

__all__ = ["DTYPES", "TWINS", "as_arrays", "as_tensors", "serves"]

DTYPES = (torch.float32, torch.bfloat16)
INTEGERS = (torch.int8, torch.int32, torch.int64, torch.bool)

Twin = Callable[..., Any]
TWINS: dict[str, Twin] = {}
"""Functions by op; each takes the op's schema with arrays for tensors."""


def serves(
    op: str,
    *,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    stored: tuple[torch.dtype, ...] = (),
    finish: Callable[..., Any] | None = None,
) -> Callable[[Twin], Twin]:
    """Declare the decorated function, which takes the op's schema with arrays for tensors, as the TPU's of `op`.

    stored: further dtypes of its weights.
    finish: takes the results as tensors, and the call by keyword; returns what the op does.

    CPU tensors are served only where this backend is asked for by name: its priority is below every other's.
    """

    def declare(twin: Twin) -> Twin:
        def call(**arguments: Any) -> Any:
            out = _run(twin, arguments)
            return out if finish is None else finish(out, **arguments)

        TWINS[op] = twin
        common: dict[str, Any] = {"dtypes": dtypes, "describe": functools.partial(_describe, twin)}
        taken = (*DTYPES, *INTEGERS, *stored)
        on_tpu, on_cpu = (functools.partial(where, twin, taken) for where in (_refuse_on_tpu, _refuse_on_cpu))
        implements(op, TPU, device=DEVICE, refuse=on_tpu, **common)(call)
        implements(op, TPU, device="cpu", refuse=on_cpu, priority=-TPU.priority - 2, **common)(call)
        return twin

    return declare


def _run(twin: Twin, arguments: dict[str, Any]) -> Any:
    import jax

    with _somewhere():
        # The arrays may share the tensors' memory: nothing may be left to read it when the caller goes on.
        return as_tensors(jax.block_until_ready(twin(**as_arrays(arguments))))


def as_arrays(arguments: dict[str, Any]) -> dict[str, Any]:
    """Convert the tensors among the arguments to arrays on JAX's device."""
    import jax

    device = jax.devices()[0]
    return {
        name: jax.device_put(jax.dlpack.from_dlpack(_plain(value)), device) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def as_tensors(out: Any) -> Any:
    """Convert an array, or a tuple of them, to CPU tensors."""
    import jax

    if isinstance(out, tuple):
        return tuple([as_tensors(array) for array in out])
    return torch.from_dlpack(jax.device_put(out, jax.devices("cpu")[0]))


def _plain(tensor: Tensor) -> Tensor:
    """Return the tensor contiguous, detached, and with int32 for int64, which JAX lacks by default."""
    tensor = tensor.detach().contiguous()
    return tensor.int() if tensor.dtype == torch.int64 else tensor


def _somewhere() -> AbstractContextManager[Any]:
    """Choose where to run: for the assumed chip, on this machine's TPU, or in the interpreter."""
    if _chips.assumed() is None and _chips.no_tpu() is not None:
        return _chips.interpreted()
    return contextlib.nullcontext()


def _refuse_on_cpu(twin: Twin, taken: tuple[torch.dtype, ...], **call: Any) -> str | None:
    if forced_backend() != TPU.name:
        return "CPU tensors are taken only where use_backend('tpu') or LLMKERN_BACKEND=tpu asks for it"
    return _refuse(twin, taken, **call)


def _refuse_on_tpu(twin: Twin, taken: tuple[torch.dtype, ...], **call: Any) -> str | None:
    if _chips.assumed() is None and (reason := _chips.no_tpu()) is not None:
        return reason
    return _refuse(twin, taken, **call)


def _refuse(twin: Twin, taken: tuple[torch.dtype, ...], **call: Any) -> str | None:
    if is_compiling():
        return "JAX's functions cannot be traced by torch.compile"
    for name, value in call.items():
        if isinstance(value, Tensor) and value.dtype not in taken:
            return f"{name} is {_dtype(value)}; float32 and bfloat16 are taken"
    try:
        plans = _plans(twin, call)
    except (TypeError, ValueError) as error:
        return str(error)
    return next((reason for plan in plans if (reason := plan.refusal()) is not None), None)


def _describe(twin: Twin, _capability: tuple[int, int] | None, **call: Any) -> str:
    return "; then ".join(map(str, _plans(twin, call))) or "nothing: the result is empty"


def _plans(twin: Twin, call: dict[str, Any]) -> list[Plan]:
    import jax

    from llmkern.jax._launch import recorded

    shapes = {
        name: jax.ShapeDtypeStruct(tuple(value.shape), "int32" if value.dtype == torch.int64 else _dtype(value))
        for name, value in call.items()
        if isinstance(value, Tensor)
    }
    plain = {name: value for name, value in call.items() if name not in shapes}
    with _somewhere(), recorded(dry=True) as plans:
        jax.eval_shape(lambda arrays: twin(**arrays, **plain), shapes)
    return plans


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
