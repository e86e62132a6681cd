"""Run any model in float64 without a float64 copy of it: the exact result that the accuracy rule compares with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Float64", "WidenCalls", "is_view", "mapped", "written_by"]

_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_aten = torch.ops.aten
# They only move values: gathering before widening is exact and spares a wide copy of an embedding table.
_GATHERS = (_aten.embedding.default, _aten.index_select.default, _aten.gather.default, _aten.index.Tensor)


# They compare dtypes before an operator is dispatched, and raise or warn: widened at the Python call instead.
_COMPARE_FIRST = (
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    torch.rms_norm,
    F.rms_norm,
)


class WidenCalls(TorchFunctionMode):
    """Widen the arguments of the calls that compare dtypes before an operator is dispatched."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _COMPARE_FIRST:
            args, kwargs = mapped(_widen, args), mapped(_widen, kwargs)
        return func(*args, **kwargs)


class Float64(TorchDispatchMode):
    """Within the block every operator computes in float64, whatever the dtypes of its arguments.

    Operands are widened for the duration of one operator, so the extra memory is the largest operator's operands
    and the activations, not a second model.  Casts to and allocations in a narrower floating dtype become float64
    too.  Views stay views and in-place writes keep the dtype of what they write to, so nothing that existed
    before the block changes.  Integers and booleans are left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls = WidenCalls()

    def __enter__(self) -> Float64:
        self._calls.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._calls.__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.widened(func, args, kwargs or {})

    def widened(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the operator's result on widened arguments."""
        if is_view(func):
            return func(*args, **kwargs)
        schema = func._schema
        if func is _aten._grouped_mm.default:
            func = _grouped_mm
        if func in _GATHERS:
            return mapped(_widen, func(*args, **kwargs))
        if schema.is_mutable:
            written = written_by(schema, args, kwargs)
            narrow = next((t.dtype for t in written if t.is_floating_point()), torch.float64)
            return func(*_cast(args, narrow, written), **_cast(kwargs, narrow, written))
        return mapped(_widen, func(*mapped(_widen, args), **mapped(_widen, kwargs)))


@functools.cache
def is_view(func: Any) -> bool:
    """Return True if the operator returns views of its arguments."""
    return any(
        returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns
    )


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply `function` to the leaves of an operator's arguments or results: nested tuples, lists and dicts.

    PyTorch's tree_map knows more containers, and takes several times as long as most operators of a small case.
    """
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([mapped(function, each) for each in value])
    if kind is dict:
        return {key: mapped(function, each) for key, each in value.items()}
    return function(value)


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _NARROW else value
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def _grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`a[offs[i-1]:offs[i]] @ b[i]` for each expert i; PyTorch's own operator has no float64."""
    if offs is None or a.dim() != 2 or b.dim() != 3:
        raise NotImplementedError("grouped_mm in float64 takes a [tokens, in], b [experts, in, out] and offs")
    ends = offs.tolist()
    out = a.new_zeros(a.shape[0], b.shape[2])
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        out[start:end] = a[start:end] @ b[expert]
    return out if bias is None else out + bias


def written_by(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that the operator writes to."""
    values = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs
    writes = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    found = [values.get(name) for name in writes]
    return [t for value in found for t in (value if isinstance(value, (list, tuple)) else [value]) if t is not None]


def _cast(values: Any, dtype: torch.dtype, written: list[Tensor]) -> Any:
    """Floating tensors in `dtype`, except those that are written to."""

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or any(value is w for w in written):
            return value
        return value.to(dtype)

    return mapped(cast, values)
