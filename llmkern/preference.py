"""Calls for which an able backend gives way to a later one: data by compute capability and form of call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkern.config import settings

if TYPE_CHECKING:
    from llmkern.registry import Implementation

__all__ = ["GivesWay", "in_order"]

Capability = tuple[int, int]


@dataclass(frozen=True)
class GivesWay:
    """GPUs and calls for which an implementation is asked after another backend's instead of before it.

    to: the other backend's name.  since, before: compute capabilities, the second exclusive.
    when: takes the call's arguments by keyword; sizes are compared by `llmkern.registry.known`.
    because: the sentence for `llmkern why`.
    """

    to: str
    since: Capability
    before: Capability
    when: Callable[..., bool]
    because: str

    def applies(self, call: dict[str, Any], capability: Capability | None) -> bool:
        """Return True if it does so for this call on a GPU of this capability; None: on no GPU."""
        return capability is not None and self.since <= capability < self.before and self.when(**call)


def in_order(
    implementations: Sequence[Implementation], call: dict[str, Any], capability: Capability | None
) -> Sequence[Implementation]:
    """Return the implementations, given best first, with each behind the one that it gives way to for this call.

    Where that backend is not among them nothing changes, nor under LLMKERN_BATCH_INVARIANT=1: the choice goes by sizes.
    """
    if settings.batch_invariant or all([impl.gives_way is None for impl in implementations]):
        return implementations
    ordered = list(implementations)
    for impl in implementations:
        way = impl.gives_way
        if way is None:
            continue
        places = [i for i, other in enumerate(ordered) if other.backend.name == way.to]
        if places and ordered.index(impl) < places[0] and way.applies(call, capability):
            ordered.insert(places[0], ordered.pop(ordered.index(impl)))
    return ordered
