"""Attention in transformers models: modules whose forward looks its function up in AttentionInterface."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from llmkern.integrations.transformers.attention import INTERFACE, why_registered
from llmkern.integrations.transformers.config_view import original_of
from llmkern.swap.derive import mentioned_globals
from llmkern.swap.found import Found, attention_sample, linear_like

SWITCHES = ("attention",)

_REPLACEABLE = ("eager", "sdpa")


def find(module: nn.Module) -> Found | None:
    config = getattr(module, "config", None)
    if INTERFACE in mentioned_globals(type(module).forward):
        name = getattr(original_of(config), "_attn_implementation", None)
        if name not in _REPLACEABLE:
            return Found("attention", "attention", f"the model was given attn_implementation={name!r}")
        if reason := why_registered(type(module).forward, name):
            return Found("attention", "attention", reason)
        return Found("attention", "attention", sample=partial(_sample, module))
    if _attends(module):
        return Found("attention", "", "its forward does not look its attention up in transformers' AttentionInterface")
    return None


def _attends(module: nn.Module) -> bool:
    """Whether its layers or its name say that it is an attention: then leaving it deserves a line in the report."""
    if isinstance(module, nn.MultiheadAttention):  # has a rule of its own
        return False
    queries_and_keys = ({"q_proj", "k_proj"}, {"q_lin", "k_lin"}, {"query", "key"}, {"q", "k"})
    by_layers = any(module._modules.keys() >= names for names in queries_and_keys)
    by_name = "attention" in type(module).__name__.lower() and sum(map(linear_like, module.children())) > 1
    return by_layers or by_name


def _sample(module: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    head_dim = getattr(module, "head_dim", None) or getattr(module.config, "head_dim", None) or 64
    return attention_sample(getattr(module, "num_key_value_groups", 1), 1, head_dim, dtype, device)
