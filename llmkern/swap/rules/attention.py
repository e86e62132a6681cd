"""Attention in transformers models: modules whose forward looks its function up in AttentionInterface.

The forward finds another interface under that global's name, and the config stays as it is.  A model under eager
attention makes a dense mask for each call; where all attentions in a decoder are swapped, the decoder's forward is
given mask functions that leave out what "causal" and "window" say, as sdpa's do (`skipping_masks`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from llmkern.integrations.transformers.attention import (
    INTERFACE,
    interface,
    mask_functions,
    register_once,
    skipping_mask,
    why_registered,
)
from llmkern.swap.derive import as_before, mentioned_globals
from llmkern.swap.edit import Edit, edits_of
from llmkern.swap.guard import Path
from llmkern.swap.match import Match, attention_sample, linear_like

SWITCHES = ("attention",)

_REPLACEABLE = ("eager", "sdpa")
_MADE, _SKIPPED = "masks are made", "masks are skipped"  # variants for a model under eager attention


def find(module: nn.Module) -> Match | None:
    if INTERFACE in mentioned_globals(type(module).forward):
        name = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if name not in _REPLACEABLE:
            return Match("attention", "attention", f"the model was given attn_implementation={name!r}")
        if reason := why_registered(type(module).forward, name):
            return Match("attention", "attention", reason)
        register_once()
        edits = {choice: _edit(type(module).forward, name, choice == _SKIPPED) for choice in (_MADE, _SKIPPED)}
        return Match("attention", "attention", edit=edits[_MADE], edits=edits, sample=partial(_sample, module))
    if is_named(module):
        return Match("attention", "", "its forward does not look its attention up in transformers' AttentionInterface")
    return None


@cache
def _edit(forward: Callable[..., Any], name: str, skipped: bool) -> Edit:
    """The edit for an attention whose config names `name`.  skipped: a mask that is None may mean a causal one; under
    sdpa that is so in any case."""
    ours = interface(forward, name, skipped or name != "eager")
    return Edit("attention", rebinds=((INTERFACE, ours),))


@dataclass(frozen=True)
class _Attend:
    """The condition that the attentions in a decoder are still those for which its masks need not be made."""

    attentions: tuple[tuple[Path, Edit], ...]

    def __call__(self, decoder: Any) -> bool:
        if torch.compiler.is_compiling():  # transformers skips hardly any mask there
            return False
        guards = {}
        for path, edit in self.attentions:
            child = decoder
            for name in path:
                child = child._modules.get(name)
                if child is None:
                    return False
            if edit not in edits_of(child) or "forward" in vars(child):
                return False
            guards[child._llmkern_guard] = child
        return all(guard.broken(child) is None for guard, child in guards.items())


def skipping_masks(decoder: nn.Module, attentions: dict[str, Match]) -> tuple[Edit, dict[str, Edit]] | None:
    """The edit of a decoder that need not make its masks, and those of the attentions in it, which are given by their
    paths from there; None where it makes no masks of its own, or not as eager attention wants them."""
    made = mask_functions(as_before(decoder))
    modules: list[Any] = [decoder.get_submodule(path) for path in attentions]
    if not made or {module.config._attn_implementation for module in modules} != {"eager"}:
        return None
    # Under eager attention a decoder's modules need not say that they are causal (BigBird-Pegasus', NLLB-MoE's).
    causal = any(getattr(module, "is_causal", True) for module in modules)
    edits = {path: found.edits[_SKIPPED] for path, found in attentions.items()}
    attend = _Attend(tuple([(tuple(path.split(".")), edit) for path, edit in edits.items()]))
    rebinds = tuple([(name, skipping_mask(function, causal)) for name, function in made.items()])
    return Edit(rebinds=rebinds, when=attend), edits


def is_named(module: nn.Module) -> bool:
    """Return True if its layers or its name suggest an attention, so that leaving it deserves a line in the report."""
    if isinstance(module, nn.MultiheadAttention):  # has a rule of its own
        return False
    queries_and_keys = ({"q_proj", "k_proj"}, {"q_lin", "k_lin"}, {"query", "key"}, {"q", "k"})
    by_layers = any(names.issubset(module._modules.keys()) for names in queries_and_keys)
    by_name = "attention" in type(module).__name__.lower() and sum(map(linear_like, module.children())) > 1
    return by_layers or by_name


def _sample(module: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    head_dim = getattr(module, "head_dim", None) or getattr(module.config, "head_dim", None) or 64
    return attention_sample(getattr(module, "num_key_value_groups", 1), 1, head_dim, dtype, device)
