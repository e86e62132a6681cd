"""Peers: the libraries that we are compared with.

`llmkern/bench/peers/<peer>.py` holds `PEER`, with a function for each op and each model variant that it can do.
Nothing of the library is imported before one of them runs; `missing` says in a sentence why none can.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llmkern.discovery import import_children

__all__ = ["OpPeer", "Peer", "Unsupported", "Variant", "need", "peers", "peers_named", "variants"]

Thunk = Callable[[], Any]


class Unsupported(Exception):
    """The peer cannot do this call; the message is a sentence."""


@dataclass(frozen=True)
class OpPeer:
    """One way in which a peer computes an op.

    prepare: takes the call (the arguments of the op's schema), packs and converts what a user would pack and convert
        once, and returns the function to time.  Raises `Unsupported`.
    approximate: None for the op's own function, else what is computed instead.
    timed: False where a time would mean nothing, as in an interpreter; it is judged all the same.
    """

    provider: str
    prepare: Callable[[dict[str, Any]], Thunk]
    approximate: str | None = None
    timed: Callable[[], bool] = lambda: True


@dataclass(frozen=True)
class Variant:
    """One way to run a model.

    build: takes a `Spec`, returns a runner (`llmkern.bench.variants` has both).  kinds: "causal", "encoder".
    dtypes: those in which it is measured unless it is asked for as NAME@DTYPE; empty for a precision of its own.
    int8: whether it is one of those that `--quantize int8` selects.  default, quick: whether it is measured without
    being asked for, and with `--quick` too.
    """

    name: str
    peer: str
    build: Callable[[Any], Any]
    kinds: tuple[str, ...]
    dtypes: tuple[str, ...]
    int8: bool
    default: bool
    quick: bool


@dataclass
class Peer:
    """One library.  missing: returns why it cannot run here, or None."""

    name: str
    missing: Callable[[], str | None] = lambda: None
    ops: dict[str, list[OpPeer]] = field(default_factory=dict)
    variants: dict[str, Variant] = field(default_factory=dict)

    def op(
        self,
        *names: str,
        provider: str | None = None,
        approximate: str | None = None,
        timed: Callable[[], bool] = lambda: True,
    ) -> Callable[[Callable[[dict[str, Any]], Thunk]], Callable[[dict[str, Any]], Thunk]]:
        """Decorator: `prepare` for these ops."""

        def register(prepare: Callable[[dict[str, Any]], Thunk]) -> Callable[[dict[str, Any]], Thunk]:
            for name in names:
                self.ops.setdefault(name, []).append(OpPeer(provider or self.name, prepare, approximate, timed))
            return prepare

        return register

    def variant(
        self,
        name: str,
        *,
        kinds: Sequence[str] = ("causal", "encoder"),
        dtypes: Sequence[str] = ("float32",),
        int8: bool = False,
        default: bool = True,
        quick: bool = True,
    ) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
        """Decorator: `build` of a `Variant`."""

        def register(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
            self.variants[name] = Variant(name, self.name, build, tuple(kinds), tuple(dtypes), int8, default, quick)
            return build

        return register


def need(module: str, package: str, *, cuda: bool = False) -> Callable[[], str | None]:
    """`missing` of a peer that is one Python package."""

    def missing() -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed: pip install {package}"
        if cuda and not torch.cuda.is_available():
            return f"{package} needs a CUDA GPU"
        return None

    return missing


def peers() -> dict[str, Peer]:
    """Every peer by name, PyTorch first."""
    found = {module.PEER.name: module.PEER for module in import_children("llmkern.bench.peers")}
    return {name: found[name] for name in sorted(found, key=lambda name: (name != "torch", name))}


def peers_named(names: str | None) -> dict[str, Peer]:
    """Return the peers of a list like "torch,torchao"; all for None or "all", no peer for "none"."""
    known = peers()
    if names is None or names == "all":
        return known
    wanted = [] if names == "none" else names.split(",")
    for name in wanted:
        if name not in known:
            raise ValueError(f"--peers: unknown peer {name!r}; there are {', '.join(known)}, all and none")
    return {name: known[name] for name in wanted}


def variants() -> dict[str, Variant]:
    """Every way to run a model by name: PyTorch's, ours, the other peers'."""
    from llmkern.bench.ours import OURS

    torch_first, *others = peers().values()
    return {name: variant for peer in (torch_first, OURS, *others) for name, variant in peer.variants.items()}
