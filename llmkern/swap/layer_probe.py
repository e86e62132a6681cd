"""Small copies of whole layers to probe: the layer's and the attention's own forward over stand-ins for the parts.

The parts have been recognised by their own rules, so stand-ins that compute the same with other sizes take their
place; and the attention function that the layer looks up is one that notes what it is asked for.  What is left to the
forwards is to move tensors between the parts and to add them up, and `run` looks whether they do more.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.dispatch import implementation
from llmkern.integrations.transformers.attention import HARMLESS
from llmkern.nn._int8_weight import HOOKS
from llmkern.swap.derive import as_before, rebind
from llmkern.swap.guard import Path
from llmkern.swap.match import stand_in
from llmkern.swap.observe import Between, Sources, aside

__all__ = ["FAR_POSITION", "Asked", "Computed", "NotAlike", "Past", "Raises", "differs", "run", "small_copy"]

FAR_POSITION = 10**6
_READ_BY_ATTENTION = ("is_causal", "num_key_value_groups")  # of the module, by transformers' attention functions


class NotAlike(Exception):
    """A layer is not what it looks like; the message is the reason."""


class Raises(NotAlike):
    """A small copy of it cannot even be run."""


class Computed(nn.Module):
    """A stand-in that computes `function(x)`."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = aside(function)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Asked:
    """An AttentionInterface with one function, the reference; `heads` and `arguments` are those of its last call,
    `calls` counts them."""

    def __init__(self) -> None:
        self.heads = self.calls = 0
        self.arguments: dict[str, Any] = {}

    def get_interface(self, *_: Any) -> Callable[..., Any]:
        return aside(self._attend)

    def __getitem__(self, _: str) -> Callable[..., Any]:
        return aside(self._attend)

    def _attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        for name in _READ_BY_ATTENTION:
            getattr(module, name, None)
        # A False may mean something (is_causal), and so may a 0; dropout is none outside training.
        self.arguments = {n: a for n, a in kwargs.items() if n not in HARMLESS and a is not None}
        if not isinstance(dropout := self.arguments.get("dropout", 1), Tensor) and dropout == 0:
            del self.arguments["dropout"]
        self.heads = q.shape[1]
        self.calls += 1
        scale = self.arguments.get("scaling", q.shape[-1] ** -0.5)
        plain = {"key_padding_mask": None, "sinks": None, "causal": False, "window": [-1, -1], "softcap": 0.0}
        out, _ = implementation("attention", "reference").fn(
            q=q, k=k, v=v, attn_mask=mask, sm_scale=scale, return_lse=False, **plain
        )
        return out.transpose(1, 2), None


class Past:
    """A cache of one layer that holds some keys and values [B, Hkv, n, D], and says that it has seen 10⁶ tokens."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.states = k, v
        self.calls = 0

    def get_seq_length(self, *_: Any) -> int:
        return FAR_POSITION

    def update(self, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        joined = aside(torch.cat)
        return joined((self.states[0], k), 2), joined((self.states[1], v), 2)


def small_copy(
    module: nn.Module,
    stand_ins: Mapping[Path, nn.Module],
    attention: Path,
    globals_: Mapping[str, Any],
    path: Path = (),
) -> nn.Module:
    """The module and all within it in eval mode without hooks, with other modules at some paths; the attention's
    forward finds other objects under these names of globals."""
    children = {}
    for name, child in module._modules.items():
        below = (*path, name)
        if child is not None:
            children[name] = stand_ins.get(below) or small_copy(as_before(child), stand_ins, attention, globals_, below)
    made = stand_in(module, children)
    state = vars(made)
    for name in HOOKS:
        state[name] = type(state[name])()
    for name in ("forward", "_old_forward", "_hf_hook"):
        state.pop(name, None)
    if path == attention:
        forward: Any = type(module).forward
        for name, instead in globals_.items():
            forward = rebind(forward, name, instead)
        state["forward"] = types.MethodType(forward, made)
    return made


def run(module: nn.Module, how: str, asked: Asked, *args: Any, **kwargs: Any) -> Tensor:
    """What the class's own forward computes; raises `NotAlike` where it raises, attends not once, or does more between
    the parts than to move and to add.  how: which probe this is."""
    between, sources = Between(), Sources()
    asked.calls = 0
    try:
        with between, sources:
            out = type(module).forward(module, *args, **kwargs)
    except Exception as error:  # whatever foreign code raises on a stand-in that it was not made for
        raise Raises(f"a small copy of it raises {type(error).__name__} {how}") from None
    if reason := between.reason or sources.reason:
        raise NotAlike(reason)
    if asked.calls != 1:
        raise NotAlike(f"a small copy of it attends {asked.calls} times {how}")
    if not isinstance(out, Tensor):
        raise NotAlike("it returns more than the hidden states")
    return out


def differs(how: str) -> NotAlike:
    """What is raised where the values are others."""
    return NotAlike(f"a small copy of it computes something else than the op {how}")
