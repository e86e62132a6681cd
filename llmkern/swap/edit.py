"""Swap a class by editing its own forward: some globals and attributes are replaced, the rest runs as written.

Several rules may edit one class: rope and attention that of an attention module; a decoder's cache, masks and loop over
its layers that of the decoder.  Their edits become one derived class with one guard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, NamedTuple

from torch import Tensor, nn

from llmkern import dispatch
from llmkern.swap.derive import mentioned_globals, original_class, rebind, rename
from llmkern.swap.guard import guarded

__all__ = ["Edit", "edited", "edits_of"]


class Edit(NamedTuple):
    """Replacements that one rule makes in a module's class; equal edits compare equal.

    op: the op that the replacements lead to; a call that runs untouched goes on record as a fallback from it.
        "" where no single op stands behind them.
    rebinds: globals that the forward mentions, each with what it finds instead.
    renames: attributes that the forward reads of the module, each with the one that it reads instead.
    members: of the derived class, by name.
    when: asked at each call whether rebinds and renames apply; always where None.
    within: further classes whose members the guard counts.
    wrap: wraps the edited forward: wrap(own, edited) returns the forward that the class gets; edited is None if no
        edit changes the class's own.
    """

    op: str = ""
    rebinds: tuple[tuple[str, Any], ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    members: tuple[tuple[str, Any], ...] = ()
    when: Callable[..., bool] | None = None
    within: tuple[type, ...] = ()
    wrap: Callable[[Callable[..., Any], Callable[..., Any] | None], Callable[..., Any]] | None = None


def edits_of(module: nn.Module) -> tuple[Edit, ...]:
    """Return the edits that the module's class has."""
    edits: tuple[Edit, ...] = vars(type(module)).get("_llmkern_edits", ())
    return edits


def edited(module: nn.Module, edits: Iterable[Edit]) -> type[nn.Module]:
    """Return the module's class with these edits, or its original class if there are none."""
    original: Any = original_class(module)
    chosen = tuple(dict.fromkeys(edits))
    if not chosen:
        cls: type[nn.Module] = original
        return cls
    members = dict(member for edit in chosen for member in edit.members)
    within = tuple(dict.fromkeys(cls for edit in chosen for cls in edit.within))
    forward = _forward(original.forward, chosen, _seen(original.forward))
    for edit in chosen:
        if edit.wrap is not None:
            forward = edit.wrap(original.forward, forward)
    return guarded(
        original,
        forward,
        ("_llmkern_edits", chosen),
        *members.items(),
        within=within,
    )


def _seen(forward: Callable[..., Any]) -> tuple[tuple[str, int], ...]:
    return tuple([(name, id(value)) for name, value in mentioned_globals(forward).items()])


@functools.cache
def _forward(
    original: Callable[..., Any], edits: tuple[Edit, ...], seen: tuple[tuple[str, int], ...]
) -> Callable[..., Any] | None:
    """Return the forward with the edits that apply to this call, or None if none of them do.

    seen: the globals that it mentions, by identity: what is rebound keeps those that there are now.
    """
    conditions = [edit.when for edit in edits if edit.when is not None]
    forwards = {
        answers: _applied(original, [edit for edit in edits if _applies(edit, conditions, answers)])
        for answers in product((False, True), repeat=len(conditions))
    }
    whole = forwards[(True,) * len(conditions)]
    if whole is original:
        return None
    ops = tuple(dict.fromkeys(edit.op for edit in edits if edit.op and edit.wrap is None))

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        reason = self._llmkern_guard.broken(self)
        if reason is not None:
            tensors = {str(n): v for n, v in (*enumerate(args), *kwargs.items()) if isinstance(v, Tensor)}
            for op in ops:
                dispatch.record_fallback(op, type(self).__name__, reason, tensors)
            if not ops and tensors:  # a decoder: whatever it calls is swapped all the same
                dispatch.record_parts("layers_", type(self).__name__, reason, tensors)
            return original_class(self).forward(self, *args, **kwargs)
        if not conditions:
            return whole(self, *args, **kwargs)
        return forwards[tuple([condition(self) for condition in conditions])](self, *args, **kwargs)

    return forward


def _applies(edit: Edit, conditions: list[Callable[..., bool]], answers: tuple[bool, ...]) -> bool:
    return edit.when is None or answers[conditions.index(edit.when)]


def _applied(forward: Callable[..., Any], edits: list[Edit]) -> Callable[..., Any]:
    for edit in edits:
        for name, replacement in edit.rebinds:
            forward = rebind(forward, name, replacement)
        for name, instead in edit.renames:
            forward = rename(forward, name, instead)
    return forward
