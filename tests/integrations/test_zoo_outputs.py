"""Attention weights and hidden states, where a caller asks for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, Entry

import llmkern
from llmkern import dispatch

pytestmark = pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning")

every_hf_entry = pytest.mark.parametrize("entry", [e for e in ZOO if e.kind != "plain"], ids=str)


def extra_outputs(result: Any, what: str) -> dict[str, tuple[Tensor | None, ...]]:
    """The tuples of tensors that `what` ("attentions", "hidden_states") adds, by name."""
    return {name: value for name, value in result.items() if name.endswith(what) and isinstance(value, tuple)}


def built(entry: Entry, attention: str | None) -> nn.Module:
    config = entry.config()
    if attention is not None:
        config._attn_implementation = attention
    return entry.build(config=config)


class Fallbacks(list):
    """The reasons why calls were handed to the untouched implementation."""

    def served(self, *call: Any) -> None:
        pass

    def fell_back(self, op: str, call: dict[str, Any], to: str, reason: str) -> None:
        self.append(reason)


@every_hf_entry
@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("what", ["attentions", "hidden_states"])
@torch.no_grad()
def test_extra_outputs_are_those_of_the_untouched_model(entry: Entry, attention: str | None, what: str) -> None:
    inputs = entry.inputs(padding=entry.paddings[-1])
    options = {f"output_{what}": True}
    # sdpa has no attention weights to give; an optimized model gives those of eager attention whatever it was before.
    expected = built(entry, "eager" if what == "attentions" else attention)(**inputs, **options)
    model = built(entry, attention)
    llmkern.optimize_(model)
    fallbacks = Fallbacks()
    with dispatch.recording(fallbacks):
        result = model(**inputs, **options)
    ours, theirs = extra_outputs(result, what), extra_outputs(expected, what)
    assert ours.keys() == theirs.keys()
    assert theirs
    for name in theirs:
        assert len(ours[name]) == len(theirs[name])
        for mine, other in zip(ours[name], theirs[name], strict=True):
            assert (mine is None) == (other is None)
            if other is not None:
                compare(entry, mine, other, inputs, what)
    if what == "attentions":
        assert fallbacks
        assert all("attention weights" in reason for reason in fallbacks)
    else:
        assert not fallbacks
    # Asking once leaves no trace.
    del fallbacks[:]
    with dispatch.recording(fallbacks):
        again = model(**inputs)
    assert not fallbacks
    assert not extra_outputs(again, what)


def compare(entry: Entry, mine: Tensor, other: Tensor, inputs: dict[str, Tensor], what: str) -> None:
    """At the queries that are not padding."""
    if what == "attentions" and entry.kind in ("decoder", "encoder") and "attention_mask" in inputs:
        mine, other = mine.transpose(1, 2), other.transpose(1, 2)
    mine, other = entry.at_kept_positions(mine, inputs), entry.at_kept_positions(other, inputs)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
