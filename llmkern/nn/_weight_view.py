"""Floating-point view of a quantized module's weight, for all code that reads `.weight`.

Other libraries take a quantized layer for the nn.Linear that it is a subclass of: adapters multiply its `.weight`,
merging adds to it, tokens' rows are looked up in it.  What they get is a `WeightView`: it has the shape, dtype and
device of the floating-point weight, is computed when its values are read, and notices when it is written.  Stored
(in `_parameters`, state dicts, files) is the packed weight alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["WeightView", "settle_views"]


_alive: weakref.WeakValueDictionary[int, WeightView] = weakref.WeakValueDictionary()
"""Every view that somebody holds, by its id."""


def settle_views(modules: Collection[Any]) -> None:
    """Point the views of modules that have become floating point at the new memory: `parameter.data = view` reads a
    tensor's memory without calling any of its methods.
    """
    for view in list(_alive.values()):
        if view.module in modules:
            with torch._C.DisableTorchFunctionSubclass():
                _SET_DATA(view, view.values())


class WeightView(Tensor):
    """View of the weight of `module`, or a view derived from it (`replay`), computed from the module's current codes.

    A write turns the module into the floating-point layer that its codes stand for, and then goes into that layer's
    weight: what other libraries merge is exact, and never rounded or lost without a word.
    """

    _is_param = True  # isinstance(view, nn.Parameter), as code that looks for a layer's weight asks
    _is_hf_initialized = True  # transformers' initialisation leaves it alone

    module: Any
    replay: Callable[[Tensor], Tensor] | None
    kept: Tensor | None

    @staticmethod
    def __new__(
        cls, module: Any, like: Tensor, device: torch.device, replay: Callable[[Tensor], Tensor] | None = None
    ) -> WeightView:
        view: WeightView = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=device,
        )
        view.module, view.replay, view.kept = module, replay, None
        _alive[id(view)] = view
        return view

    def values(self) -> Tensor:
        """Return a plain tensor with the values; the layer's own memory once it is floating point."""
        weight = self.module.dequantized_weight() if self.is_packed else self.module.weight.detach()
        return weight if self.replay is None else self.replay(weight)

    @property
    def is_packed(self) -> bool:
        """True until the module becomes floating point."""
        return hasattr(self.module, "dequantized_weight")

    def written(self) -> None:
        """Make the module floating point, because its weight is about to be written."""
        if self.is_packed:
            self.module.make_floating()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.values()!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.values().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values().clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, WeightView):
            if func in _GRADIENTS and (args[1:] or (True,))[0]:
                if first.replay is not None:
                    raise RuntimeError("a view of an int8 weight cannot require gradients; take a clone() of it")
                first.written()
                return first.module.weight.requires_grad_(True)
            if func in _WRITERS:
                first.written()
                if func == _SET_DATA and first.replay is None:  # `layer.weight.data = tensor`
                    first.module.weight.data = _plain(args[1])
                    return None
                return func(first.values(), *_plain(args[1:]), **_plain(kwargs))
            if func in _MEMORY:
                if first.kept is None:  # one memory as long as the view lives: its address tells tied weights
                    first.kept = first.values().contiguous()
                return func(first.kept, *args[1:], **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        return out.values() if isinstance(out, WeightView) and not out.is_packed else out

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if schema.is_mutable:
            named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
            for argument in schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for leaf in tree_leaves(named.get(argument.name)):
                        if isinstance(leaf, WeightView):
                            leaf.written()
        elif isinstance(args[0], WeightView) and schema.returns and schema.returns[0].alias_info is not None:
            return _view_of(args[0], func, args[1:], kwargs)
        elif func is torch.ops.aten._to_copy.default and (moved := _moved(args[0], **kwargs)) is not None:
            return moved
        out = func(*_plain(args), **_plain(kwargs))
        in_place = schema.is_mutable and isinstance(args[0], WeightView) and schema.returns
        return args[0] if in_place and schema.arguments[0].alias_info is not None else out


def _moved(view: Any, *, device: Any = None, dtype: Any = None, **_: Any) -> WeightView | None:
    """Return the weight on another device by copying its codes there; None if more than a move is requested."""
    if device is None or device == view.device or dtype not in (None, view.dtype) or not view.is_packed:
        return None
    like = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device="meta")
    return WeightView(view.module.moved(device), like, device, view.replay)


def _view_of(view: WeightView, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of a view operator on a view: views that record how they derive from the weight."""
    before = view.replay
    shape = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device="meta")
    like = func(shape, *args, **kwargs)

    def replay(weight: Tensor) -> Any:
        return func(weight if before is None else before(weight), *args, **kwargs)

    if isinstance(like, Tensor):
        return WeightView(view.module, like, view.device, replay)
    return type(like)(
        WeightView(view.module, part, view.device, lambda weight, i=i: replay(weight)[i])  # type: ignore[misc]
        for i, part in enumerate(like)
    )


def _plain(values: Any) -> Any:
    return tree_map(lambda value: value.values() if isinstance(value, WeightView) else value, values)


_SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]
_WRITERS = frozenset({_SET_DATA, Tensor.__setitem__})
"""Functions that write without calling an operator that could be dispatched on."""

_GRADIENTS = frozenset({Tensor.requires_grad.__set__, Tensor.requires_grad_})  # type: ignore[attr-defined]

_MEMORY = frozenset(
    {Tensor.data_ptr, Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.untyped_storage, Tensor.__dlpack__}
)
"""Functions that read the memory itself."""
