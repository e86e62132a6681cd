"""Ops as torch.library operators: schema, fake, autograd and the default kernel of `torch.ops.llmkern.<op>`.

`torch.ops.llmkern.<op>` is the door to the native kernels: the library registers its CPU and CUDA kernels there,
and where it has none (or is not built) the op computes the reference.  What a native kernel cannot serve, float64
for one, it hands to `torch.ops.llmkern_reference.<op>`, so that the op answers every call its schema allows.
Public functions (llmkern.ops) go through the dispatcher instead, which takes that door only when a native kernel
is the best choice.  Forms of call that it knows go to `torch.ops.llmkern_native.<op>`: the same kernels and nothing
else, neither autograd nor a fake.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.compiler import is_compiling

from llmkern import dispatch

__all__ = ["Definition", "Native", "define", "definition", "implement_in_python", "native"]

NAMESPACE = "llmkern"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_reference_library = torch.library.Library(f"{NAMESPACE}_reference", "FRAGMENT")
_native_library = torch.library.Library(f"{NAMESPACE}_native", "FRAGMENT")


@dataclass(frozen=True)
class Definition:
    """Arguments of `define`, for backends with operators of their own."""

    fake: Callable[..., Any]
    backward: Callable[..., Any] | None
    setup_context: Callable[..., None] | None


_definitions: dict[str, Definition] = {}


def definition(op: str) -> Definition:
    """The fake and the autograd of `op`."""
    return _definitions[op]


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    about: Callable[..., str] | None = None,
) -> None:
    """Define `torch.ops.llmkern.<op>` and make the op known to the dispatcher.

    schema: as in native_functions.yaml, without the namespace; the first argument is a Tensor, and its device
        and dtype are what implementations declare theirs against.
    fake: shapes, dtypes and devices of the outputs, for torch.compile and torch.export; arguments as in the schema.
    backward, setup_context: as for `torch.library.register_autograd`; an op without them has no gradient.
    about: takes the call's arguments by keyword, returns what `explain` is to say of it besides its shapes.
    """
    parsed = torch._C.parse_schema(f"{NAMESPACE}::{schema}")
    name = parsed.name.removeprefix(f"{NAMESPACE}::")
    qualified = f"{NAMESPACE}::{name}"
    arguments = parsed.arguments

    reference = _by_name(arguments, lambda **call: dispatch.implementation(name, "reference").fn(**call))
    for library in (_library, _reference_library):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, reference, "CompositeExplicitAutograd")
    _native_library.define(schema)
    _native_library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    if backward is not None:
        backward = _with_rows(backward)
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    _definitions[name] = Definition(fake, backward, setup_context)
    lists = any("List" in str(a.type) and "Tensor" in str(a.type) for a in arguments)
    # Where a gradient is to be differentiated again (create_graph=True), a formula of PyTorch's operators serves it.
    differentiable = backward is not None or name.endswith("_backward")
    names = [a.name for a in arguments]
    dispatch.define_op(name, names, differentiable=differentiable, lists=lists, about=about)


def _with_rows(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward` with gradients in contiguous rows, as kernels read them: that of a sum is one element, expanded."""

    @functools.wraps(backward)
    def with_rows(ctx: Any, *gradients: Any) -> Any:
        return backward(ctx, *[_in_rows(gradient) for gradient in gradients])

    return with_rows


def _in_rows(gradient: Any) -> Any:
    if isinstance(gradient, torch.Tensor) and gradient.dim() and gradient.stride(-1) != 1:
        return gradient.contiguous()
    return gradient


def implement_in_python(op: str, fn: Callable[..., Any], key: str) -> None:
    """Make `fn`, which takes the schema's arguments by keyword, the kernel of `op` for a dispatch key such as "CPU".

    For ops that are loops over other operators; a tracing compiler sees one operator all the same.
    """
    by_name = _by_name(getattr(torch.ops.llmkern, op).default._schema.arguments, fn)
    for library in (_library, _native_library):
        library.impl(op, by_name, key)


def _by_name(arguments: Sequence[Any], fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fn` with the arguments of a schema by position or keyword."""

    def call(*args: Any, **kwargs: Any) -> Any:
        # The dispatcher drops trailing arguments that equal their defaults.
        named = {a.name: a.default_value for a in arguments[len(args) :] if a.has_default_value()}
        named.update(zip((a.name for a in arguments), args, strict=False))
        named.update(kwargs)
        return fn(**named)

    return call


class Native:
    """The call of a native kernel as an implementation's function: arguments by keyword.

    kernel: the op whose kernel it is.
    positional: the same for plain tensors without gradients, modes and transforms, of which `dispatch` makes sure;
    arguments in the order of the schema.  The shortest way from Python.
    """

    def __init__(self, op: str) -> None:
        self.kernel = op
        self._operator = getattr(torch.ops.llmkern, op).default
        self.positional: Callable[..., Any] = getattr(torch.ops.llmkern_native, op).default._op

    def __call__(self, **arguments: Any) -> Any:
        if torch.is_grad_enabled() or is_compiling():
            return self._operator(**arguments)
        # Without gradients the operator's autograd layer, which is Python, only costs: half of a small call.
        with torch._C._AutoDispatchBelowAutograd():
            return self._operator(**arguments)


def native(op: str) -> Native:
    """`op` on the native kernels of its tensors' device."""
    return Native(op)
