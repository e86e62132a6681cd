"""Matches: what a rule decides about a module, and the probes by which it verifies the decision."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.swap.edit import Edit
from llmkern.swap.guard import Guard, shell_class
from llmkern.swap.observe import Sources

__all__ = [
    "PROBE_SCALE",
    "PROBE_TOLERANCE",
    "Match",
    "agrees",
    "attention_sample",
    "is_stateless",
    "linear_like",
    "probe",
    "remembered",
    "remembering_refusals",
    "stand_in",
    "why_elsewhere",
]

PROBE_TOLERANCE = 1e-5
"""Share of the largest value: probes run in fp32 and may sum in another order; other definitions differ far more."""

PROBE_SCALE = 1e3
"""Factor of a second probe's inputs: to show limits that some models set (gelu_10, swiglu_limit, clip_qkv)."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_OF_ACCELERATE = frozenset({"forward", "_old_forward", "_hf_hook"})


@dataclass(frozen=True)
class Match:
    """A module of a kind that llmkern knows.

    kind, op: as in `SwapRow`.  reason: why it must be left alone, "" where it can be swapped.
    cls, edit: the two ways to swap it: the class to give it, or what to change of its own (llmkern/swap/edit.py).
    sample: given a dtype and a device, a small call of the op with this module's sizes, to name the backend that
        will serve it.
    edits, served: where there is a choice of edits, each by its name, `edit` being that of the default; and where no op
        is called, what the report names instead of a backend, by the same names.
    for_op: for a module that calls no op itself (`only_for_children`), the op of the modules inside it that need the
        swap; "" for any.
    is_whole: it is served without the modules within it being called.  Its switches must all be on.
    switches: those of `optimize_` that it depends on, where they are not all of its rule's.
    """

    kind: str
    op: str
    reason: str = ""
    cls: type[nn.Module] | None = None
    edit: Edit | None = None
    sample: Callable[[torch.dtype, torch.device], dict[str, Any]] | None = field(default=None, repr=False)
    edits: Mapping[str, Edit] = field(default_factory=dict)
    served: Mapping[str, str] = field(default_factory=dict)
    for_op: str = ""
    is_whole: bool = False
    switches: tuple[str, ...] = ()

    @property
    def only_for_children(self) -> bool:
        """Return True if it calls no op itself and is swapped only so that modules inside are called; it gets no report
        row.
        """
        return not self.op and not self.reason and not self.served


_REMEMBERED = 8  # of one key: modules that differ in an attribute, and classes whose surroundings have changed
_known: dict[Any, deque[Match]] = {}


_refusals: dict[Any, Match] | None = None


@contextlib.contextmanager
def remembering_refusals() -> Iterator[None]:
    """Within the block, skip probing a module that equals, attributes included, one that was refused in the block."""
    global _refusals
    before, _refusals = _refusals, {}
    try:
        yield
    finally:
        _refusals = before


def remembered(key: Any, module: nn.Module, find: Callable[[], Match | None]) -> Match | None:
    """Return `find()`, or its earlier result for a module with an equal key if the guard of that match holds for this
    module: the guard has all that the forward reads, so a probe would see the same again.

    key: what `find` depends on and no guard looks at, classes and sizes.
    """
    own = None if _refusals is None else (key, tuple(map(_plain_attributes, module.modules())))
    if own is not None and own in (_refusals or {}):
        return _refusals[own]  # type: ignore[index]
    known = _known.setdefault(key, deque(maxlen=_REMEMBERED))
    for found in known:
        guard: Guard = found.cls._llmkern_guard  # type: ignore[union-attr]
        if guard.broken(module) is None:
            return found
    result = find()
    if result is not None and result.cls is not None:
        known.appendleft(result)
    elif result is not None and own is not None and _refusals is not None:
        _refusals[own] = result
    return result


def _plain_attributes(module: nn.Module) -> tuple[Any, ...]:
    """Return the values of plain attributes (numbers, strings …) by name, and the identities of other objects; leave
    out the layer's index in the cache, which differs in every layer.
    """
    own = [(k, v) for k, v in vars(module).items() if k not in _OF_EVERY_MODULE and k != "layer_idx"]
    return tuple([(k, v if isinstance(v, (bool, int, float, str, type(None))) else id(v)) for k, v in own])


def is_stateless(module: nn.Module) -> bool:
    """Check that running the forward has no side effects: the module holds nothing that a call could fill."""
    plain = (bool, int, float, str, bytes, tuple, type(None), torch.dtype, torch.device)
    own = [v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE and k not in _OF_ACCELERATE]
    return not module._buffers and all(isinstance(v, plain) or callable(v) or hasattr(v, "to_dict") for v in own)


def stand_in(
    module: nn.Module, children: Mapping[str, nn.Module] | None = None, parameters: Mapping[str, Any] | None = None
) -> nn.Module:
    """Return a shell of the module's original class, in eval mode, with other children or parameters: cheap to probe,
    and it records which attributes are read (`llmkern.swap.guard`).
    """
    cls, attributes = shell_class(module)
    shell = object.__new__(cls)
    vars(shell).update(attributes)
    kept = {name: None if child is None else stand_in(child) for name, child in module._modules.items()}
    vars(shell)["_modules"] = {**kept, **(children or {})}
    vars(shell)["_parameters"] = {**module._parameters, **(parameters or {})}
    vars(shell)["training"] = False
    return shell


def probe(module: nn.Module, *inputs: Tensor) -> Tensor | None:
    """Return the result of the class's own forward, without hooks and gradients; None if it cannot take the inputs."""
    try:
        with torch.no_grad():
            out = type(module).forward(module, *inputs)
    except Exception:  # whatever foreign code raises on inputs that it was not made for, it is not the kind sought
        return None
    return out if isinstance(out, Tensor) else None


def why_elsewhere(module: nn.Module, *inputs: Tensor, beyond_autocast: bool = False) -> str:
    """Return why the class's own forward may compute something else on other inputs, or "" if neither its source nor
    that of the functions it calls suggests so.

    beyond_autocast: as for `Sources`.
    """
    with Sources(beyond_autocast=beyond_autocast) as sources:
        probe(module, *inputs)
    return sources.reason


def agrees(out: Tensor | None, expected: Tensor) -> bool:
    """Check that a probe's result equals the expected one, up to rounding."""
    if out is None or out.shape != expected.shape or not out.is_floating_point():
        return False
    scale = float(expected.abs().max()) or 1.0
    return float((out.double() - expected.double()).abs().max()) <= PROBE_TOLERANCE * scale


def linear_like(module: nn.Module | None) -> bool:
    """Recognize nn.Linear, its subclasses, and adapters around one (peft): anything with `in_features` and
    `out_features`.
    """
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def attention_sample(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Make a small causal self-attention call."""
    q = torch.zeros(1, heads, 2, head_dim, dtype=dtype, device=device)
    kv = torch.zeros(1, kv_heads, 2, head_dim, dtype=dtype, device=device)
    return {
        "q": q,
        "k": kv,
        "v": kv,
        "attn_mask": None,
        "key_padding_mask": None,
        "sinks": None,
        "causal": True,
        "sm_scale": head_dim**-0.5,
        "window": [-1, -1],
        "softcap": 0.0,
        "return_lse": False,
    }
