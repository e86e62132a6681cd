"""Swap a module by giving it a subclass of its own class; nothing else about it changes.

The instance keeps its parameters, hooks, attributes and identity; `isinstance` and names stay what they were, and a
printed module says what serves it; undoing it is assigning the old class.  Other instances keep their class.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from llmkern import dispatch

__all__ = [
    "Swapped",
    "as_before",
    "derive",
    "describe",
    "forward_is_replaced",
    "is_own",
    "is_swapped",
    "mentioned_globals",
    "mentions",
    "original_class",
    "rebind",
    "rename",
    "restored_class",
    "set_class",
    "untouched",
    "wrapped_functions",
]


_served_by: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()  # beside the modules: not in a pickle


def describe(module: nn.Module, text: str) -> None:
    """Let a swapped module print `text` behind its class, for example "rms_norm on cpu"."""
    _served_by[module] = text


class Swapped:
    """Mixin of every class made by `derive`.  A swapped module pickles as the original would."""

    def extra_repr(self) -> str:
        """Return the class's own text followed by what serves the module, as `print(model)` shows them."""
        own: str = super().extra_repr()  # type: ignore[misc]  # nn.Module's
        served = _served_by.get(self)
        return ", ".join(filter(None, (own, f"llmkern: {served}" if served else "llmkern")))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Protocol 1's form: pickle insists that protocol 2's names the class of the object at hand.
        reduced: Any = super().__reduce_ex__(1)
        constructor, arguments, *state = reduced
        original = original_class(self)
        return (constructor, tuple(original if a is type(self) else a for a in arguments), *state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def derive(cls: type[nn.Module], forward: Callable[..., Any] | None, *attributes: tuple[str, Any]) -> type[nn.Module]:
    """Return the subclass of `cls` with this `forward` (None keeps the class's own) and these class attributes; equal
    arguments give the same class.
    """
    key: Any = cls  # mypy takes nn.Module's __hash__ for its metaclass's
    return _derive(key, forward, attributes)


@functools.cache
def _derive(cls: Any, forward: Callable[..., Any] | None, attributes: tuple[tuple[str, Any], ...]) -> Any:
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_llmkern_original": cls,
        **({} if forward is None else {"forward": forward}),
        **dict(attributes),
    }
    return type(cls.__name__, (Swapped, cls), namespace)


def untouched(module: Any, op: str, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a swapped module's original forward and record why `op` could not serve the call."""
    tensors = {name: v for name, v in (*enumerate(args), *kwargs.items()) if isinstance(v, Tensor)}
    dispatch.record_fallback(op, type(module).__name__, reason, {str(name): v for name, v in tensors.items()})
    return module._llmkern_original.forward(module, *args, **kwargs)


def is_own(cls: Any, name: str) -> bool:
    """Check that the class's method of that name comes from the file that defines the class."""
    code = getattr(getattr(cls, name), "__code__", None)
    return code is not None and code.co_filename == getattr(sys.modules.get(cls.__module__), "__file__", None)


def is_swapped(module: nn.Module) -> bool:
    """Return True if the module's class was made by `derive`, or derives from such a class."""
    return isinstance(module, Swapped)


def as_before(module: nn.Module) -> nn.Module:
    """Return the module as rules should see it: a shell of its original class if it is swapped already."""
    if not is_swapped(module):
        return module
    shell: nn.Module = object.__new__(original_class(module))
    vars(shell).update(vars(module))
    return shell


def original_class(module: object) -> Any:
    """Return the class that the module had before it was swapped, or its own class if it is not swapped."""
    return getattr(type(module), "_llmkern_original", type(module))


def restored_class(cls: Any) -> Any:
    """Return a swapped class as it was; one that was derived from it since (FSDP2 does) as if derived from that class.

    Returns None if a method of the derived class says `super()`: it would still mean the swapped class.
    """
    return _restored_class(cls)


@functools.cache
def _restored_class(cls: Any) -> Any:
    if "_llmkern_original" in vars(cls):
        return cls._llmkern_original
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    inherited = {f for base in cls.__bases__ for f in wrapped_functions(getattr(base, "forward", None))}
    if inherited.intersection(wrapped_functions(own.get("forward"))):  # transformers wraps that of every subclass
        del own["forward"]
    if any("__class__" in getattr(getattr(v, "__code__", None), "co_freevars", ()) for v in own.values()):
        return None
    bases = tuple([restored_class(base) if issubclass(base, Swapped) else base for base in cls.__bases__])
    return None if None in bases else type(cls)(cls.__name__, bases, own)


# Where an instance may hold its class's forward: accelerate's hooks (device_map) keep it in `_old_forward` and call it
# from theirs, and transformers 4 leaves a bound method behind after it has collected hidden states.
_HOLDERS = ("forward", "_old_forward")


def forward_is_replaced(module: nn.Module) -> bool:
    """Return True if calling the module would not run its class's forward."""
    return "forward" in vars(module) and not _holders(module)


def _holders(module: nn.Module) -> list[str]:
    own = type(module).forward
    return [name for name in _HOLDERS if getattr(vars(module).get(name), "__func__", None) is own]


def set_class(module: nn.Module, cls: Any) -> None:
    """Give the module a class; wherever the former class's forward is stored on the instance, store the new one."""
    for name in _holders(module):
        vars(module)[name] = types.MethodType(cls.forward, module)
    module.__class__ = cls


def rebind(function: Any, name: str, replacement: Any) -> Any:
    """Return a copy of `function` in which the global `name` is `replacement`.

    Decorators are followed through their closures.  The function itself is returned where nothing refers to `name`.
    """

    def changed(code: types.CodeType, scope: dict[str, Any]) -> tuple[types.CodeType, dict[str, Any]]:
        if name in code.co_names and name in scope:
            # Without __name__, torch.compile looks globals up in this dict instead of in the module of that name.
            scope = {key: value for key, value in scope.items() if key != "__name__"} | {name: replacement}
        return code, scope

    return _copied(function, changed)


def rename(function: Any, name: str, instead: str) -> Any:
    """Return a copy of `function` that reads the attribute `instead` wherever it reads `name`; otherwise like
    `rebind`.
    """

    def changed(code: types.CodeType, scope: dict[str, Any]) -> tuple[types.CodeType, dict[str, Any]]:
        if name in code.co_names:
            code = code.replace(co_names=tuple([instead if each == name else each for each in code.co_names]))
        return code, scope

    return _copied(function, changed)


def _copied(function: Any, changed: Callable[..., tuple[Any, Any]], _above: tuple[Any, ...] = ()) -> Any:
    """Copy `function` and everything its decorators wrap, with `changed` applied to their code and globals."""
    if not isinstance(function, types.FunctionType) or function in _above:
        return function
    code, scope = changed(function.__code__, function.__globals__)
    cells = []
    for cell, content in _cells(function):
        copied = _copied(content, changed, (*_above, function))
        cells.append(cell if copied is content else types.CellType(copied))
    closure = tuple(cells) if function.__closure__ else None
    if code is function.__code__ and scope is function.__globals__ and closure == function.__closure__:
        return function
    made = types.FunctionType(code, scope, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(made, function)
    vars(made).pop("__wrapped__", None)
    return made


def mentioned_globals(function: Any) -> dict[str, Any]:
    """Return the globals that the function, or anything its decorators wrap, mentions by name."""
    return {name: scope[name] for scope, name in mentions(function)}


def mentions(function: Any, _above: tuple[Any, ...] = ()) -> list[tuple[dict[str, Any], str]]:
    """Return the names of these globals, each with the dictionary that holds it."""
    if not isinstance(function, types.FunctionType) or function in _above:
        return []
    found = [(function.__globals__, n) for n in function.__code__.co_names if n in function.__globals__]
    for _, content in _cells(function):
        found += mentions(content, (*_above, function))
    return found


def wrapped_functions(function: Any, _above: tuple[Any, ...] = ()) -> list[types.FunctionType]:
    """Return the function and those its decorators wrap, as they will run: found through closures, not
    `__wrapped__`.
    """
    if not isinstance(function, types.FunctionType) or function in _above:
        return []
    found = [function]
    for _, content in _cells(function):
        found += wrapped_functions(content, (*_above, function))
    return found


def _cells(function: types.FunctionType) -> list[tuple[types.CellType, Any]]:
    """Return the closure's cells and their contents (None for a cell that is still empty)."""
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append((cell, cell.cell_contents))
        except ValueError:
            found.append((cell, None))
    return found
