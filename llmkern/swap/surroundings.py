"""State outside a module that its forward depends on: classes, globals, registries, and process-wide modes."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from llmkern.swap.derive import mentions
from llmkern.swap.snapshot import Snapshot
from llmkern.transforms import is_intercepted, why_mode, why_transformed

__all__ = ["Place", "Surroundings", "classes_within", "surroundings", "why_hooks_for_all", "why_untouched"]

Place = tuple[Mapping[Any, Any], Any, str]
"""A mapping, a key of it, and what to call the value in a sentence."""

# A call goes through these attributes of classes that all models share; they have too much else to watch.
_OF_LIBRARIES = ("forward", "__call__", "_call_impl", "__getattr__")
_ABSENT = object()
_SPECIAL = ("__call__", "__getattr__", "__getattribute__")


class Surroundings:
    """Class members, the globals that their methods mention, and other places; compared by identity."""

    def __init__(self, classes: tuple[type, ...], places: Iterable[Place]) -> None:
        self._forwards = tuple([(cls, cls.forward) for cls in classes if hasattr(cls, "forward")])
        self._snapshot = Snapshot()
        self._shown: list[tuple[Mapping[Any, Any], Any, Any, str]] = []
        for held, name, shown in (*_members(classes), *places):
            self._snapshot.entry(held, name)
            self._shown.append((held, name, held.get(name, _ABSENT), shown))
        self.hold = self._snapshot.holds

    def why(self) -> str | None:
        """Return a sentence naming what has changed, or None."""
        if self.hold():
            return None
        for held, name, value, shown in self._shown:
            if held.get(name, _ABSENT) is not value:
                what = f"there is another {name}" if value is _ABSENT else f"{shown} was replaced"
                return f"{what} since it was swapped"
        return None

    def why_traced(self) -> str | None:
        """Like `why`, for torch.compile: checks the forwards only, since its graphs guard everything else they read."""
        for cls, forward in self._forwards:
            if cls.forward is not forward:
                return "a forward was replaced since it was swapped"
        return None


_known: dict[Any, list[Surroundings]] = {}


def surroundings(classes: tuple[type, ...], places: tuple[Place, ...] = ()) -> Surroundings:
    """Return the surroundings of these classes as they are now; the same object while nothing changes."""
    known = _known.setdefault((classes, tuple([(id(held), name) for held, name, _ in places])), [])
    for each in known:
        if each.hold():
            return each
    known.append(Surroundings(classes, places))
    return known[-1]


def _members(classes: tuple[type, ...]) -> Iterator[Place]:
    for base in dict.fromkeys(base for cls in classes for base in cls.__mro__[:-1]):
        members = vars(base)
        if base.__module__.startswith(("torch.", "transformers.")) and ".models." not in base.__module__:
            for name in _OF_LIBRARIES:
                yield members, name, f"{base.__name__}.{name}"
            continue
        for name, member in members.items():
            if name.startswith("__") and name not in _SPECIAL:
                continue
            yield members, name, f"{base.__name__}.{name}"
            for scope, mentioned in mentions(member):
                if not isinstance(scope[mentioned], types.ModuleType):
                    yield scope, mentioned, f"{mentioned} of {scope.get('__name__')}"
        if "forward" not in members:
            yield members, "forward", f"{base.__name__}.forward"


def why_untouched() -> str | None:
    """Return why no swapped module at all may serve a call now, or None."""
    if torch.compiler.is_compiling() or not is_intercepted():
        return None
    return why_transformed() or why_mode()


def why_hooks_for_all() -> str | None:
    """Return a sentence if there are hooks for all modules, which a bypassed module would not trigger; None if there
    are none but those of `llmkern.explain`, which is informed of whole layers.
    """
    for hooks in (
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
        nn_module._global_backward_hooks,
        nn_module._global_backward_pre_hooks,
    ):
        if hooks and any(getattr(hook, "__module__", "") != "llmkern.explain" for hook in hooks.values()):
            return "there are hooks for every module"
    return None


def classes_within(module: nn.Module) -> tuple[type, ...]:
    """Return the classes of the module and of all within it; original classes for swapped ones."""
    return tuple(dict.fromkeys([getattr(type(m), "_llmkern_original", type(m)) for m in module.modules()]))
