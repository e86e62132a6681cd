"""Every architecture of the zoo, optimized: attributes that change afterwards count as in the untouched model."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, Entry

import llmkern

pytestmark = pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning")

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
# What transformers' sdpa leaves out without a mask and llmkern does not; two layers at one place of a cache; heads of
# keys that take all the room of the values; and what torch's fused layer leaves out and its parts do not.
_OF_NO_USE = {"sliding_window", "layer_idx", "num_key_value_heads", "add_zero_attn"}


def changes(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Dictionaries of the module, names in them, and other values for these."""
    state = vars(module)
    for name, value in state.items():
        if name in _OF_EVERY_MODULE or name in _OF_NO_USE:
            continue
        if isinstance(value, bool):
            yield state, name, not value
        elif isinstance(value, int):
            yield state, name, 2 * value or 1
        elif isinstance(value, float):
            yield state, name, 1.5 * value + 0.1
        elif isinstance(value, _FUNCTIONS):
            yield state, name, torch.tanh
    for name, child in module._modules.items():
        if child is not None and not child._modules and not child._parameters and type(child) is not nn.Dropout:
            yield module._modules, name, nn.Tanh()
    if isinstance(module, nn.LayerNorm) and module.bias is None:
        yield module._parameters, "bias", nn.Parameter(torch.linspace(-1, 1, *module.normalized_shape))


@torch.no_grad()
def run(entry: Entry, model: nn.Module) -> Tensor | None:
    torch.manual_seed(0)
    try:
        return entry.output(model(**entry.inputs(padding="none")))
    except Exception:  # the untouched model's own, with an attribute that does not fit
        return None


@pytest.mark.parametrize("entry", ZOO, ids=str)
def test_attributes_are_read_at_the_call(entry: Entry) -> None:
    untouched, model = entry.build(), entry.build()
    llmkern.optimize_(model)
    seen, compared = set(), 0
    for (path, one), other in zip(untouched.named_modules(), model.modules(), strict=True):
        if isinstance(one, nn.Embedding):  # max_norm writes to the weight
            continue
        for (held, name, value), (held_other, *_) in zip(list(changes(one)), list(changes(other)), strict=True):
            what = type(one), path.rpartition(".")[2], name
            if what in seen:
                continue
            seen.add(what)
            before = held[name]
            held[name] = held_other[name] = value
            expected = run(entry, untouched)
            if expected is not None:
                torch.testing.assert_close(run(entry, model), expected, rtol=1e-3, atol=1e-3, msg=f"{path}.{name}")
                compared += 1
            held[name], held_other[name] = before, before
    assert compared > 10
    torch.testing.assert_close(run(entry, model), run(entry, untouched), rtol=1e-3, atol=1e-3)
