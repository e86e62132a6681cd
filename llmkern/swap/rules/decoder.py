"""Models that call their layers in a plain loop: it runs over one element, which computes all of them at once."""

from __future__ import annotations

from torch import nn

from llmkern.swap.derive import as_before
from llmkern.swap.layer_loop import layer_loop
from llmkern.swap.layer_stack import one_element
from llmkern.swap.match import Match
from llmkern.swap.rules import layer

SWITCHES = layer.SWITCHES


def find(module: nn.Module) -> Match | None:
    if not any(type(child) is nn.ModuleList for child in module._modules.values()):
        return None
    loop = layer_loop(type(module).forward)
    layers = None if loop is None else module._modules.get(loop.layers)
    if loop is None or type(layers) is not nn.ModuleList or (loop.counted and not hasattr(module, "config")):
        return None
    first = next(iter(layers), None)
    found = None if first is None else layer.find(as_before(first))
    if found is None or found.reason:
        return None
    return Match("layer", "", edit=one_element(loop), for_op=found.op, switches=found.switches)
