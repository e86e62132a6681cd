"""Decorators that turn an op's launcher into an implementation: eager, traceable and differentiable."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.compiler import is_compiling

from llmkern.backends.triton import TRITON, interpreted
from llmkern.backends.triton._launch import tracing
from llmkern.checks import PLAIN_TENSORS
from llmkern.dispatch import implements
from llmkern.library import definition
from llmkern.registry import needs_grad

__all__ = ["DTYPES", "serves"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Launcher = Callable[..., Any]
Refuse = Callable[..., "str | None"]


def serves(
    op: str,
    *,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    has_backward: bool = False,
    refuse: Refuse | None = None,
    for_gradient: Mapping[str, Any] | None = None,
) -> Callable[[Launcher], Launcher]:
    """Declare the decorated launcher, whose signature is the op's schema, as Triton's implementation of `op`.

    Eager calls without gradients run the launcher itself: an operator's layers in Python would cost more than the
    launch.  Under torch.compile, and where a gradient is needed, `torch.ops.llmkern_triton.<op>` is called: a
    `triton_op`, whose kernels the compiler sees, with the op's own fake and backward.

    for_gradient: as for `llmkern.dispatch.implements`.

    The interpreter serves CPU tensors only where it is asked for by name: its priority is below every backend's.
    """

    def declare(launcher: Launcher) -> Launcher:
        # Where the backend refuses every call nobody needs operators: making one imports torch's compiler, which takes
        # seconds and 100 MB, and without Triton torch warns of each.
        operator = launcher if TRITON.missing else _operator(op, launcher, has_backward)

        def call(**arguments: Any) -> Any:
            if is_compiling() or (has_backward and needs_grad(arguments)):
                return operator(**arguments)
            lead = next(iter(arguments.values()))
            return launcher(**arguments) if type(lead) in PLAIN_TENSORS else operator(**arguments)

        implements(
            op,
            TRITON,
            device="cuda",
            dtypes=dtypes,
            min_capability=(8, 0),
            has_backward=has_backward,
            refuse=refuse,
            for_gradient=for_gradient,
        )(call)
        implements(
            op,
            TRITON,
            device="cpu",
            dtypes=dtypes,
            has_backward=has_backward,
            priority=-TRITON.priority - 1,
            refuse=functools.partial(_refuse_on_cpu, refuse),
            for_gradient=for_gradient,
        )(call)
        return launcher

    return declare


def _refuse_on_cpu(refuse: Refuse | None, **call: Any) -> str | None:
    if not interpreted():
        return "on CPU tensors Triton runs only in its interpreter, where TRITON_INTERPRET=1 is set"
    return refuse(**call) if refuse is not None else None


def _operator(op: str, launcher: Launcher, has_backward: bool) -> Callable[..., Any]:
    """`torch.ops.llmkern_triton.<op>`."""

    @functools.wraps(launcher)
    def body(*args: Any, **kwargs: Any) -> Any:
        with tracing():
            return launcher(*args, **kwargs)

    # `infer_schema` resolves annotations in the function's own globals: give it types instead of their names.
    hints = typing.get_type_hints(launcher)
    signature = inspect.signature(launcher)
    body.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p.replace(annotation=hints[p.name]) for p in signature.parameters.values()],
        return_annotation=hints["return"],
    )
    # A compiler cannot see into the interpreter: there the operator stays whole.
    make: Any = torch.library.custom_op if interpreted() else torch.library.triton_op
    operator = make(f"llmkern_triton::{op}", body, mutates_args=())
    defined = definition(op)
    operator.register_fake(defined.fake)
    if has_backward and defined.backward is not None:
        operator.register_autograd(defined.backward, setup_context=defined.setup_context)
    return getattr(torch.ops.llmkern_triton, op).default
