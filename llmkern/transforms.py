"""Detection of PyTorch's transforms and modes, which see the operators themselves.

Forward-mode AD and torch.func (vmap, jvp, …) follow every operator, and know nothing of a kernel's; a mode may do
anything at all with an operator or a function, and is told of the kernel instead of them.
"""

from __future__ import annotations

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

__all__ = ["is_intercepted", "is_transformed", "why_mode", "why_transformed"]

_TRANSFORMED = "forward-mode AD or a transform of torch.func is at work, which follows PyTorch's own operators only"


def is_transformed() -> bool:
    """Return True if forward-mode AD or a transform of torch.func is active."""
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def why_transformed() -> str | None:
    """The same as a sentence."""
    return _TRANSFORMED if is_transformed() else None


def is_intercepted() -> bool:
    """Return True if one of these, or a mode, may be active."""
    return (
        forward_ad._current_level >= 0
        or peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
    )


def why_mode() -> str | None:
    """Return which active mode may intercept operators or functions of PyTorch, or None.

    Not `torch.set_default_device`, which is one to PyTorch, nor those by which it traces.
    """
    if torch._C._len_torch_dispatch_stack():
        for mode in map(torch._C._get_dispatch_stack_at, range(torch._C._len_torch_dispatch_stack())):
            if getattr(mode, "_mode_key", None) is None:
                return f"a {type(mode).__name__} is at work, which is told of PyTorch's own operators only"
    if torch._C._len_torch_function_stack():
        for mode in map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack())):
            if not isinstance(mode, DeviceContext):
                return f"a {type(mode).__name__} is at work, which is told of PyTorch's own functions only"
    return None
