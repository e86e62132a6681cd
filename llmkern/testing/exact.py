"""A model's forward in float64 throughout: the exact result that judges it in lower precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from llmkern.testing.compare import upcast

__all__ = ["Float64", "in_float64"]


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class Float64(TorchFunctionMode):
    """Within the block, what asks for float32 gets float64.

    Models compute norms, softmax and rotary angles in float32 whatever their own dtype is; in a float64 model that
    would round the very parts that are to be judged.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        kwargs = {name: _double(value) for name, value in (kwargs or {}).items()}
        return func(*[_double(value) for value in args], **kwargs)


def in_float64(model: torch.nn.Module) -> tuple[torch.nn.Module, Callable[..., Any]]:
    """A float64 copy of `model`, and a function that calls it on inputs given in any precision, within `Float64`."""
    exact = copy.deepcopy(model).double()
    if hasattr(exact, "set_experts_implementation"):  # transformers 5: the default is torch's grouped_mm, fp32 at most
        exact.set_experts_implementation("eager")

    def run(**inputs: Any) -> Any:
        with Float64():
            return exact(**upcast(inputs))

    return exact, run
