"""Guard swapped modules: at each call, check that everything their forwards rely on is unchanged.

What a module computes is found out by a probe, and holds while all that its forward goes by is what it was:

- attributes of the module, of modules within it that are computed without being called, and of their configs.  The
  shells that are probed note which of them the forward reads (`shell_class`, `noted`).
- what lies outside it (llmkern/swap/surroundings.py): members of the classes that it inherits from, globals that its
  forward mentions, attention functions that are registered under its model's name; hooks for all modules, modes and
  transforms that are at work in the whole process.

Each call of a swapped module begins by asking its `Guard`, which answers with a sentence where something has changed.
Tensors and linear layers are none of this: a swapped forward takes them as they are at the call.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from llmkern.integrations.transformers.attention import why_collected
from llmkern.swap.derive import derive, untouched
from llmkern.swap.surroundings import Place, Surroundings, surroundings, why_hooks_for_all, why_untouched

__all__ = [
    "UNSEEN",
    "Guard",
    "Part",
    "Path",
    "Read",
    "are_inert",
    "below",
    "guarded",
    "noted",
    "places",
    "shell_class",
    "stated",
    "why_hooks",
]

Path = tuple[str, ...]

UNSEEN = "its forward reads an attribute that may change unseen"
_NOTES = "_llmkern_notes"  # where a shell keeps the names that are read of it
_CONFIG, _COMPUTED = _CONFIGS = "config", "config:"  # the second: what has no place in the config's `__dict__`
_BEHIND = "_internal"  # where transformers' configs keep what a property of the name without it checks
_INERT = "install_output_capuring_hook.<locals>.output_capturing_hook"  # transformers 5's, which stays once installed
# Not noted: what every module has, but for `training`; and transformers' flag, which means something in training only.
_NOT_NOTED = (frozenset(vars(nn.Module())) | frozenset(dir(nn.Module))) - {"training"} | {"gradient_checkpointing"}


class Read(NamedTuple):
    """An attribute that a forward reads: `name` in the dictionary `holder` of the module ("" for its own attributes,
    "config" for its config's), with its value, or `_ABSENT` if the instance had none (its class may).
    """

    holder: str
    name: str
    value: Any


class Part(NamedTuple):
    """A guarded module: the swapped one (path ()) or one that is computed without being called.  Holds its path from
    the swapped module, the class it had when it was probed, and what is read from it.
    """

    path: Path
    cls: type[nn.Module]
    reads: tuple[Read, ...]


class _Absent:
    def __repr__(self) -> str:
        return "not set"


_ABSENT = _Absent()


class _Partial(NamedTuple):
    """A functools.partial compared by function and arguments: every module of a class has a partial of its own."""

    function: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


class _Method(NamedTuple):
    """A method of the module itself that is stored as an attribute."""

    function: Any


_COMPARED = (bool, int, float, str, bytes, tuple, torch.Size, torch.dtype, torch.device, type(None))
_IDENTICAL = (types.FunctionType, types.BuiltinFunctionType, type, _Absent)


def _own_class(module: nn.Module) -> Any:
    """Return the module's class, or the original one if it is swapped; a class derived from a swapped class stays
    itself.
    """
    cls = type(module)
    return cls.__dict__.get("_llmkern_original", cls)


def shell_class(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]]:
    """Return a class for a shell of the module that records which attributes are read, and the shell's attributes."""
    attributes = {**vars(module), _NOTES: set()}
    config = attributes.get(_CONFIG)
    if hasattr(config, "__dict__"):
        attributes[_CONFIG] = _NotedConfig(config, attributes[_NOTES])
    return _noting(_own_class(module)), attributes


@cache
def _noting(cls: Any) -> Any:
    def getattribute(self: Any, name: str) -> Any:
        if name not in _NOT_NOTED:
            object.__getattribute__(self, "__dict__")[_NOTES].add(("", name))
        return super(noting, self).__getattribute__(name)

    namespace = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__getattribute__": getattribute}
    noting: Any = type(cls.__name__, (cls,), {**namespace, "_llmkern_noted": cls})
    if "forward" in vars(noting):  # transformers' layers wrap the forward of every subclass, as it is at that time
        del noting.forward
    return noting


class _NotedConfig:
    def __init__(self, config: Any, notes: set[tuple[str, str]]) -> None:
        self._llmkern_config, self._llmkern_notes = config, notes

    def __getattr__(self, name: str) -> Any:
        if not isinstance(getattr(self._llmkern_config, name, None), types.MethodType):
            self._llmkern_notes.add((_CONFIG, name))
        return getattr(self._llmkern_config, name)


def noted(shell: Any, live: str | float = "", path: Path = ()) -> tuple[Part, ...] | None:
    """Return the parts of a shell with every attribute that was read; skip stand-ins that are not shells.
    live: an attribute that the swapped forward reads at each call.
    Returns None if a change to something that was read could go unnoticed, as in the middle of a list.

    live: an attribute that the swapped forward reads at each call.
    None where a change of what was read would not be seen, as in the middle of a list.
    """
    names = vars(shell)[_NOTES] - {("", live)}
    if isinstance(shell, _DropoutNd):
        names = names & {("", "training")}  # the rest has a meaning in training only
    part = _part(shell, path, type(shell)._llmkern_noted, names)
    if part is None:
        return None
    found = [part]
    for name, child in shell._modules.items():
        if child is not None and _NOTES in vars(child):
            within = noted(child, "", (*path, name))
            if within is None:
                return None
            found += within
    return tuple(found)


def stated(module: nn.Module, *names: str) -> tuple[Part, ...] | None:
    """Guard the named attributes, and child modules of these names, which must not be in training.  For forwards whose
    reads are known without tracing.  Returns None in the same cases as `noted`.
    """
    parts = [_part(module, (), _own_class(module), {("", name) for name in names})]
    for name in names:
        child = module._modules.get(name)
        if child is not None:
            parts.append(Part((name,), _own_class(child), (Read("", "training", False),)))
    found = [part for part in parts if part is not None]
    return tuple(found) if len(found) == len(parts) else None


def below(path: Path, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Return the parts with `path` put in front of their own paths."""
    return tuple([part._replace(path=path + part.path) for part in parts])


def merged(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Merge parts so that there is one per module, with everything that is read from it."""
    found: dict[tuple[Path, Any], dict[Read, None]] = {}
    for part in parts:
        found.setdefault((part.path, part.cls), {}).update(dict.fromkeys(part.reads))
    return tuple([Part(path, cls, tuple(reads)) for (path, cls), reads in found.items()])


@dataclass(frozen=True)
class Guard:
    """Conditions that a swapped class relies on; classes with equal guards are the same class."""

    parts: tuple[Part, ...]
    surroundings: Surroundings
    skips: bool  # whether modules within it are not called

    def broken(self, module: nn.Module) -> str | None:
        """Return the guard's first broken condition as a sentence, or None."""
        if torch.compiler.is_compiling():
            reason = self.surroundings.why_traced()
        else:
            reason = self.surroundings.why() or why_untouched()
            if reason is None and self.skips:
                reason = why_hooks_for_all()
        if reason is not None:
            return reason
        for part in self.parts:
            reason = _changed(module, part)
            if reason is not None:
                return reason
        return None


def guarded(
    cls: type[nn.Module],
    forward: Callable[..., Any] | None,
    *attributes: tuple[str, Any],
    op: str = "",
    parts: tuple[Part, ...] = (),
    within: tuple[type, ...] = (),
    places: tuple[Place, ...] = (),
) -> type[nn.Module]:
    """Return the class to swap in for `cls`, with this forward, these attributes, and its guard as `_llmkern_guard`.

    op: what `forward` calls; where the guard has a reason not to, the original forward runs, on record.  "" leaves it
        to `forward` to ask.  None for the forward that the class has.
    within: other classes whose members count.  places: what else counts.
    """
    original = cls.__dict__.get("_llmkern_original", cls)
    counted = tuple(dict.fromkeys((original, *[part.cls for part in parts], *within)))
    guard = Guard(merged(parts), surroundings(counted, places), any(part.path for part in parts))
    if forward is not None and op:
        forward = _asking(forward, op)
    return derive(cls, forward, ("_llmkern_guard", guard), *attributes)


@cache
def _asking(forward: Callable[..., Any], op: str) -> Callable[..., Any]:
    @functools.wraps(forward)
    def asked(self: Any, *args: Any, **kwargs: Any) -> Any:
        reason = self._llmkern_guard.broken(self)
        if reason is not None:
            return untouched(self, op, reason, args, kwargs)
        return forward(self, *args, **kwargs)

    return asked


def _changed(module: nn.Module, part: Part) -> str | None:
    """Return a sentence naming what has changed in the part, or None."""
    path, cls, reads = part
    child: Any = module
    for name in path:
        child = child._modules.get(name)
    if path:
        now: Any = type(child)
        if now is not cls and now.__dict__.get("_llmkern_original") is not cls:
            return f"{'.'.join(path)} is a {now.__name__}, not a plain {cls.__name__}"
    state = child.__dict__
    if path:
        reason = why_hooks(".".join(path), state)
        if reason is not None:
            return reason
    for holder, name, value in reads:
        if not holder:
            now = state.get(name, _ABSENT)
        elif holder == _CONFIG and not torch.compiler.is_compiling():
            # transformers' configs have a __getattribute__ in Python, which takes a microsecond.
            now = object.__getattribute__(state[_CONFIG], "__dict__").get(name, _ABSENT)
        else:
            now = _value(state, holder, name)
        if now is not value and (type(now) is not type(value) or now != value) and not _equal(now, value):
            return _sentence(path, holder, name, now, value)
    return None


def places(module: nn.Module, part: Part) -> Iterator[tuple[Any, str]]:
    """Return the dictionaries or configs that hold, or would hold, the attributes read from the module, and their
    names.
    """
    state = vars(module)
    for holder, name, _ in part.reads:
        if holder in _CONFIGS:
            config = state[_CONFIG]
            yield state, _CONFIG
            yield vars(config) if holder == _CONFIG else config, name
        else:
            yield state[holder] if holder else state, name


def are_inert(hooks: dict[int, Any]) -> bool:
    """Return True if these forward hooks do nothing unless transformers 5 collects outputs."""
    return all(getattr(hook, "__qualname__", "") == _INERT for hook in hooks.values())


def why_hooks(name: str, state: dict[str, Any]) -> str | None:
    """Return why a module with these attributes has to be called (it has hooks that act), or None."""
    forward = state["_forward_hooks"]
    if forward or state["_forward_pre_hooks"] or "forward" in state or _hears_gradients(state):
        if state["_forward_pre_hooks"] or "forward" in state or not are_inert(forward) or _hears_gradients(state):
            return f"{name} has hooks, or a forward of its own"
        return why_collected()
    return None


def _hears_gradients(state: dict[str, Any]) -> bool:
    return bool(state["_backward_hooks"] or state["_backward_pre_hooks"])


class _Unseen(Exception):
    pass


def _part(module: nn.Module, path: Path, cls: type[nn.Module], names: set[tuple[str, str]]) -> Part | None:
    try:
        reads = [_read(module, cls, holder, name) for holder, name in sorted(names)]
    except _Unseen:
        return None
    return Part(path, cls, tuple([read for read in reads if read is not None]))


def _read(module: nn.Module, cls: type[nn.Module], holder: str, name: str) -> Read | None:
    """Return what was read under that name; None for modules, which are parts, and tensors, which are read at each
    call.
    """
    state = vars(module)
    if holder == _CONFIG:
        config = state[_CONFIG]._llmkern_config
        value = getattr(config, name, _ABSENT)
        for key in (name, getattr(config, "attribute_map", {}).get(name, name), name + _BEHIND):
            if vars(config).get(key, _ABSENT) is value:
                return Read(_CONFIG, key, _frozen(value, cls))
        return Read(_COMPUTED, name, _frozen(value, cls))
    if name in state:
        value = state[name]
        return None if isinstance(value, _NotedConfig) else Read("", name, _frozen(value, cls))
    for store in ("_parameters", "_buffers", "_modules"):
        if name in state[store]:
            if state[store][name] is None:
                return Read(store, name, None)
            if store == "_buffers":
                raise _Unseen
            return None
    return Read("", name, _ABSENT)


def _frozen(value: Any, owner: type[nn.Module]) -> Any:
    """Return an attribute of `owner` in an immutable form, or `_Unseen` if there is none."""
    if isinstance(value, _IDENTICAL):
        return value
    if isinstance(value, tuple):
        for each in value:
            _frozen(each, owner)
        return value
    if type(value) in _COMPARED:
        return value
    if type(value) is partial:
        kwargs = tuple([(name, _frozen(each, owner)) for name, each in sorted(value.keywords.items())])
        return _Partial(_frozen(value.func, owner), tuple([_frozen(each, owner) for each in value.args]), kwargs)
    if type(value) is types.MethodType and isinstance(value.__self__, owner):
        return _Method(value.__func__)
    raise _Unseen


def _value(state: dict[str, Any], holder: str, name: str) -> Any:
    if holder in _CONFIGS:
        return getattr(state[_CONFIG], name, _ABSENT)
    return state[holder].get(name, _ABSENT)


def _equal(now: Any, value: Any) -> bool:
    if type(now) is partial:
        return isinstance(value, _Partial) and (now.func, now.args, tuple(sorted(now.keywords.items()))) == value
    if type(now) is types.MethodType:
        return isinstance(value, _Method) and now.__func__ is value.function
    return type(now) in _COMPARED and bool(now == value)


def _sentence(path: Path, holder: str, name: str, now: Any, value: Any) -> str:
    if torch.compiler.is_compiling():  # values have no names there
        return f"{name} is no longer what it was when it was swapped"
    names = [*path, _CONFIG if holder in _CONFIGS else "", name.removesuffix(_BEHIND)]
    return f"{'.'.join(filter(None, names))} is {_shown(now)}, and was {_shown(value)} when it was swapped"


def _shown(value: Any) -> str:
    named = getattr(value, "function", value)
    return getattr(named, "__name__", None) or (
        repr(value) if isinstance(value, (*_COMPARED, _Absent)) else type(value).__name__
    )
