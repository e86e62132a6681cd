"""A view of a transformers config that differs from it in one thing: the attention implementation it names.

transformers reads `config._attn_implementation` at every forward, and several models may share one config object.
So the config itself is left alone, and each module of the optimized model gets a view instead: the instance of
a subclass of the config's own class, with the same name and the *same* `__dict__`.  Whatever is written through
either is seen through both, and a pickled or saved view is the untouched config.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["NAME", "is_view", "knows_causality", "learn_causality", "original_of", "view_of"]

NAME = "llmkern"
"""What a view answers for `_attn_implementation`; registered in AttentionInterface and AttentionMaskInterface."""


class _View:
    """What a view's class adds to its config's class.  Each view has a class of its own, which holds its state:
    the instance's `__dict__` is the config's, and torch.compile reads class attributes like any others."""

    _llmkern_original: Any
    _llmkern_named: Any  # what the config behind named when the view was made
    _llmkern_causal = True  # see `knows_causality`

    # The view answers `NAME` until the config behind it names something else (model.set_attn_implementation): an
    # explicit choice wins.
    @property
    def _attn_implementation_internal(self) -> Any:
        named = self._llmkern_original._attn_implementation_internal
        return NAME if named == self._llmkern_named else named

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, value: Any) -> None:
        if value != NAME:
            self._llmkern_original._attn_implementation_internal = value

    @property
    def output_attentions(self) -> Any:
        return self._llmkern_original.output_attentions

    @output_attentions.setter
    def output_attentions(self, value: Any) -> None:
        self._llmkern_original.output_attentions = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Protocol 1's form: pickle insists that protocol 2's names the class of the object at hand.
        return self._llmkern_original.__reduce_ex__(1)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = copy.deepcopy(self._llmkern_original, memo)
        # While torch.compile traces, no class can be made, and the copies that models make there are only read.
        if torch.compiler.is_compiling():
            return copied
        view = view_of(copied)
        type(view)._llmkern_causal = self._llmkern_causal
        return view


def view_of(config: Any, views: dict[int, Any] | None = None) -> Any:
    """The view of `config` in `views` (by the config's id), or a new one, kept there; a view is returned as it is."""
    views = {} if views is None else views
    if is_view(config):
        views.setdefault(id(original_of(config)), config)
        return config
    if id(config) in views:
        return views[id(config)]
    cls = type(config)
    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_llmkern_original": config,
        "_llmkern_named": config._attn_implementation_internal,
    }
    for name in getattr(cls, "sub_configs", {}):
        if hasattr(getattr(config, name, None), "_attn_implementation"):
            namespace[name] = _sub_config(name, view_of(getattr(config, name), views))
    view: Any = object.__new__(type(cls.__name__, (_View, cls), namespace))
    object.__setattr__(view, "__dict__", config.__dict__)
    views[id(config)] = view
    return view


def _sub_config(name: str, sub_view: Any) -> property:
    def get(self: Any) -> Any:
        value = getattr(self._llmkern_original, name)
        return sub_view if value is sub_view._llmkern_original else value

    return property(get, lambda self, value: setattr(self._llmkern_original, name, value))


def original_of(config: Any) -> Any:
    """The config behind a view; any other object is returned as it is."""
    return config._llmkern_original if is_view(config) else config


def is_view(config: Any) -> bool:
    """Whether `config` is a view."""
    return isinstance(config, _View)


def learn_causality(attentions: Iterable[Any]) -> None:
    """Let the views that these attention modules hold know whether a causal mask may be left out.

    Under sdpa the untouched model leaves it out, whatever its modules say.  Under eager attention it never does, so
    that a decoder's modules need not say that they are causal (BigBird-Pegasus' and NLLB-MoE's do not).
    """
    said: dict[type, bool] = {}
    for module in attentions:
        if not is_view(module.config):
            continue
        cls = type(module.config)
        says = getattr(module, "is_causal", True) or original_of(module.config)._attn_implementation == "sdpa"
        said[cls] = said.get(cls, False) or bool(says)
    for cls, causal in said.items():
        cls._llmkern_causal = causal


def knows_causality(config: Any) -> bool:
    """Whether a causal mask may be left out for attention under this config."""
    return not is_view(config) or config._llmkern_causal
