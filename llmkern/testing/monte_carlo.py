"""Monte Carlo arithmetic: how far may a careful implementation in some precision be from the exact result?

One draw runs the code in float64 and rounds the result of every operator at random, by at most half a unit in the last
place of the dtype that the operator would have had.  Sums and products also lose up to half a unit of fp32 (float64
for float64 operands) in Σ|aᵢ·bᵢ|, the bound of their backward error.  The spread of several draws is the error that
the definition itself implies: it depends on the inputs and on where the code rounds, never on a processor.

Sources: Parker, "Monte Carlo Arithmetic" (1997); Denis, Castro, Petit, "Verificarlo" (2016).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from llmkern.testing.float64 import Float64, WidenCalls, is_view, mapped, written_by

__all__ = ["DRAWS", "MonteCarlo", "draws_of"]

DRAWS = 8

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm, _aten.sum, _aten.mean)
# They only move values, which are rounded by whoever computes with them.
_MOVES = (_aten.clone, _aten.cat, _aten.stack, _aten.where, _aten.index, _aten.index_select, _aten.gather)


def draws_of(run: Callable[[], Any]) -> list[Any]:
    """Return what `run` computes, `DRAWS` times, each under its own `MonteCarlo`; the same on every machine."""
    found = []
    for seed in range(DRAWS):
        with MonteCarlo(seed):
            found.append(run())
    return found


class _NominalDtypes(WidenCalls):
    """Answer `tensor.dtype` with the dtype that the tensor stands for, so that code casts as without the mode."""

    def __init__(self, dtypes: WeakTensorKeyDictionary) -> None:
        super().__init__()
        self._dtypes = dtypes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == torch.Tensor.dtype.__get__:  # type: ignore[attr-defined]
            return self._dtypes.get(args[0]) or func(*args)
        return super().__torch_function__(func, types, args, kwargs)


class MonteCarlo(Float64):
    """Within the block every operator computes in float64 and rounds at random, as its own dtype would have rounded.

    The rounding is applied when a result is used: what leaves the block has not yet been rounded to its dtype.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)
        self._dtypes = WeakTensorKeyDictionary()  # the dtype that each float64 result stands for
        self._calls = _NominalDtypes(self._dtypes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten.promote_types.default:
            return func(*args)
        dtype = self._dtype_of_result(args, kwargs)
        if is_view(func) or func.overloadpacket in _MOVES:
            return self._mark(self.widened(func, args, kwargs), dtype)
        written = written_by(func._schema, args, kwargs) if func._schema.is_mutable else []

        def rounded(value: Any) -> Any:
            return value if any(value is w for w in written) else self._rounded(value)

        args, kwargs = mapped(rounded, args), mapped(rounded, kwargs)
        out = self.widened(func, args, kwargs)
        if written:
            return out
        if func.overloadpacket in _PRODUCTS and out.is_floating_point():
            magnitude = self.widened(func, *mapped(_magnitude, (args, kwargs)))
            unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
            out = out + self._noise(magnitude * unit)
        return self._mark(out, dtype)

    def _dtype_of_result(self, args: Any, kwargs: Any) -> torch.dtype:
        """Return the floating dtype that the operator's result would have had."""
        leaves = _leaves((args, kwargs))
        asked = [v for v in leaves if isinstance(v, torch.dtype) and v.is_floating_point]
        tensors = [v for v in leaves if isinstance(v, Tensor) and v.is_floating_point()]
        of_tensors = [self._dtypes.get(t, t.dtype) for t in [t for t in tensors if t.dim()] or tensors]
        return reduce(torch.promote_types, asked or of_tensors or [torch.get_default_dtype()])

    def _mark(self, out: Any, dtype: torch.dtype) -> Any:
        for value in _leaves(out):
            if isinstance(value, Tensor) and value.dtype == torch.float64:
                self._dtypes[value] = dtype
        return out

    def _rounded(self, value: Any) -> Any:
        """Return the tensor rounded to the dtype that it stands for."""
        dtype = self._dtypes.get(value) if isinstance(value, Tensor) else None
        if dtype is None or dtype == torch.float64:
            return value
        info = torch.finfo(dtype)
        rounded = value + self._noise(value.abs().clamp(min=info.smallest_normal) * (info.eps / 2))
        return self._mark(rounded, torch.float64)

    def _noise(self, largest: Tensor) -> Tensor:
        uniform = torch.rand(largest.shape, generator=self._generator, dtype=torch.float64).to(largest.device)
        return uniform.mul_(2).sub_(1).mul_(largest).nan_to_num_(0.0, 0.0, 0.0)


def _magnitude(value: Any) -> Any:
    return value.abs() if isinstance(value, Tensor) and value.is_floating_point() else value


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    mapped(found.append, value)
    return found
