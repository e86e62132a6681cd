"""Small copies of whole layers to probe: the layer's and the attention's own forward over stand-ins for the parts.

The parts have been recognised by their own rules, so stand-ins that compute the same with other sizes take their
place; and the attention function that the layer looks up is one that notes what it is asked for.
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
from llmkern.swap.found import stand_in
from llmkern.swap.granted import Path
from llmkern.swap.rules.attention import INTERFACE

__all__ = ["Asked", "Computed", "run", "small_copy"]

_READ_BY_ATTENTION = ("is_causal", "num_key_value_groups")  # of the module, by transformers' attention functions


class Computed(nn.Module):
    """A stand-in that computes `function(x)`."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Asked:
    """An AttentionInterface with one function, the reference; `heads` and `arguments` are those of its last call."""

    def __init__(self) -> None:
        self.heads = 0
        self.arguments: dict[str, Any] = {}

    def get_interface(self, *_: Any) -> Callable[..., Any]:
        return self._attend

    def __getitem__(self, _: str) -> Callable[..., Any]:
        return self._attend

    def _attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        for name in _READ_BY_ATTENTION:
            getattr(module, name, None)
        self.arguments = {n: a for n, a in kwargs.items() if n not in HARMLESS and a is not None and a is not False}
        self.heads = q.shape[1]
        scale = self.arguments.get("scaling", q.shape[-1] ** -0.5)
        plain = {"key_padding_mask": None, "sinks": None, "causal": False, "window": [-1, -1], "softcap": 0.0}
        out, _ = implementation("attention", "reference").fn(
            q=q, k=k, v=v, attn_mask=mask, sm_scale=scale, return_lse=False, **plain
        )
        return out.transpose(1, 2), None


def small_copy(
    module: nn.Module, stand_ins: Mapping[Path, nn.Module], attention: Path, asked: Asked, path: Path = ()
) -> nn.Module:
    """The module and all within it in eval mode without hooks, with other modules at some paths; the attention finds
    `asked` where it looks its function up."""
    children = {}
    for name, child in module._modules.items():
        below = (*path, name)
        if child is not None:
            children[name] = stand_ins.get(below) or small_copy(as_before(child), stand_ins, attention, asked, below)
    made = stand_in(module, children)
    state = vars(made)
    for name in HOOKS:
        state[name] = type(state[name])()
    for name in ("forward", "_old_forward", "_hf_hook"):
        state.pop(name, None)
    if path == attention:
        state["forward"] = types.MethodType(rebind(type(module).forward, INTERFACE, asked), made)
    return made


def run(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor | None:
    """What the class's own forward computes; None where it cannot take the arguments or returns no tensor."""
    try:
        with torch.no_grad():
            out = type(module).forward(module, *args, **kwargs)
    except Exception:  # whatever foreign code raises on a stand-in that it was not made for
        return None
    return out if isinstance(out, Tensor) else None
