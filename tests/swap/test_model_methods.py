"""What a model can do besides computing (copies, files, other dtypes, shared memory) between two tokens."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_models import DECODERS, PROMPT, STEPS, TOGETHER, TOKENS, Sequence, built, named, needs_kernels

import llmkern
from llmkern.swap.derive import is_swapped

pytestmark = [pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning"), needs_kernels]


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def shared(model: Any) -> Any:
    assert all(parameter.is_shared() for parameter in model.share_memory().parameters())
    return model


def tied_again(model: Any) -> Any:
    model.tie_weights()
    return model


def larger(model: Any) -> Any:
    model.resize_token_embeddings(80, mean_resizing=False)
    model.resize_token_embeddings(67)
    return model


def half(model: Any) -> Any:
    return model.half()


def bfloat16(model: Any) -> Any:
    return model.to(torch.bfloat16)


def model_of(name: str, quantized: bool) -> Any:
    model = built(DECODERS[name])
    if quantized:
        llmkern.quantize_(model)
    return model


models = pytest.mark.parametrize(
    ("name", "quantized"), [(name, quantized) for name in ("llama", "phi3") for quantized in (False, True)]
)


@models
@named(copy.deepcopy, pickled, saved, shared, tied_again, larger)
@torch.no_grad()
def test_the_sequence_goes_on(change: Callable[[Any], Any], name: str, quantized: bool) -> None:
    sequence = Sequence(model_of(name, quantized), model_of(name, quantized))
    llmkern.optimize_(sequence.models[1])
    for tokens in (PROMPT, STEPS[0]):
        assert sequence.give(tokens) == TOGETHER
    sequence.models = tuple(map(change, sequence.models))
    if change in (pickled, saved):  # as the untouched model
        assert not any(map(is_swapped, sequence.models[1].modules()))
        llmkern.optimize_(sequence.models[1])
    for tokens in STEPS[1:]:
        sequence.give(tokens)
    assert Sequence(*sequence.models).give(PROMPT) == TOGETHER


@models
@named(half, bfloat16)
@torch.no_grad()
def test_another_dtype(change: Callable[[Any], Any], name: str, quantized: bool) -> None:
    untouched, model = model_of(name, quantized), model_of(name, quantized)
    llmkern.optimize_(model)
    assert Sequence(untouched, model).give(PROMPT) == TOGETHER
    wanted, got = change(untouched)(TOKENS).logits, change(model)(TOKENS).logits
    assert got.dtype == wanted.dtype != torch.float32
    exact = copy.deepcopy(untouched).float()(TOKENS).logits
    assert (got - exact).norm() < 2 * (wanted - exact).norm()
    llmkern.restore_(model)
    assert torch.equal(model(TOKENS).logits, wanted)
