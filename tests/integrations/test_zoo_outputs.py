"""Attention weights and hidden states, where a caller asks for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from state import outermost
from torch import Tensor, nn
from zoo import ZOO, Entry

import llmkern
from llmkern import dispatch

pytestmark = pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning")

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
every_hf_entry = pytest.mark.parametrize("entry", [e for e in ZOO if e.kind != "plain"], ids=str)


def extra_outputs(result: Any, what: str) -> dict[str, tuple[Tensor | None, ...]]:
    """The tuples of tensors that `what` ("attentions", "hidden_states") adds, by name."""
    return {name: value for name, value in result.items() if name.endswith(what) and isinstance(value, tuple)}


def built(entry: Entry, attention: str | None) -> nn.Module:
    config = entry.config()
    if attention is not None:
        config._attn_implementation = attention
    return entry.build(config=config)


class Record:
    """The ops that were served, and the reasons why calls were handed to the untouched implementation."""

    def __init__(self) -> None:
        self.served_ops: set[str] = set()
        self.reasons: list[str] = []

    def served(self, op: str, *rest: Any) -> None:
        self.served_ops.add(op)

    def fell_back(self, op: str, call: dict[str, Any], to: str, reason: str) -> None:
        self.reasons.append(reason)


@every_hf_entry
@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("what", ["attentions", "hidden_states"])
@torch.no_grad()
def test_extra_outputs_are_those_of_the_untouched_model(entry: Entry, attention: str | None, what: str) -> None:
    if what == "attentions" and TRANSFORMERS_4 and entry.name in ("gpt2", "opt", "gpt_neox", "vit"):
        pytest.skip("transformers 4 does not tell this model's attention function that weights are wanted")
    inputs = entry.inputs(padding=entry.paddings[-1])
    options = {f"output_{what}": True}
    # sdpa has no attention weights to give; an optimized model gives those of eager attention whatever it was before.
    expected = built(entry, "eager" if what == "attentions" else attention)(**inputs, **options)
    model = built(entry, attention)
    report = llmkern.report(llmkern.optimize_(model)).swap
    record = Record()
    with dispatch.recording(record):
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
    if what == "attentions" and any(row.kind == "attention" for row in report.swapped):
        assert record.reasons
        assert all("attention weights" in reason for reason in record.reasons)
    else:  # but for layers that are computed one by one, each as a whole
        assert set(record.reasons) <= {"outputs of the layers are collected"}


@every_hf_entry
@pytest.mark.parametrize("asked", ["before", "after"])
@torch.no_grad()
def test_asking_for_extra_outputs_leaves_nothing_behind(entry: Entry, asked: str) -> None:
    """transformers 4.57 replaces forwards on instances while it collects hidden states, and puts bound methods back."""
    inputs, model = entry.inputs(), entry.build()
    if asked == "before":
        expected = entry.output(model(**inputs, output_hidden_states=True))
        report = llmkern.report(llmkern.optimize_(model)).swap
    else:
        report = llmkern.report(llmkern.optimize_(model)).swap
        expected = entry.output(entry.build()(**inputs))
        model(**inputs, output_hidden_states=True)
    assert not [row for row in report.left if "forward was replaced" in row.reason]
    record = Record()
    with dispatch.recording(record):
        result = model(**inputs)
    assert record.served_ops >= {row.op for row in outermost(report.swapped) if row.op}
    assert not record.reasons
    assert not extra_outputs(result, "hidden_states")
    llmkern.restore_(model)
    record = Record()
    with dispatch.recording(record):
        assert torch.equal(entry.output(model(**inputs)), expected)
    assert not record.served_ops


@pytest.mark.skipif(not TRANSFORMERS_4, reason="transformers 5 refuses sdpa for a model with a soft cap")
@torch.no_grad()
def test_a_soft_cap_that_the_untouched_model_leaves_out_stays_out() -> None:
    entry = next(entry for entry in ZOO if entry.name == "gemma2")
    inputs = entry.inputs()
    expected = built(entry, "sdpa")(**inputs).logits
    model = built(entry, "sdpa")
    llmkern.optimize_(model)
    record = Record()
    with dispatch.recording(record):
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert record.reasons
    assert all("soft" in reason for reason in record.reasons)


def compare(entry: Entry, mine: Tensor, other: Tensor, inputs: dict[str, Tensor], what: str) -> None:
    """At the queries that are not padding."""
    if what == "attentions" and entry.kind in ("decoder", "encoder") and "attention_mask" in inputs:
        mine, other = mine.transpose(1, 2), other.transpose(1, 2)
    mine, other = entry.at_kept_positions(mine, inputs), entry.at_kept_positions(other, inputs)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
