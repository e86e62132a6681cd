"""Training an optimized model: no gradient is cut, no dropout is dropped, adapters and checkpointing work."""

from __future__ import annotations

import copy
import functools
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, Entry

import llmkern
from llmkern.testing.compare import assert_as_accurate, upcast
from llmkern.testing.float64 import Float64

pytestmark = pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning")

GRADIENT_FACTOR = 3.0  # what flash-attention allows gradients, where results get 2
BY_NAME = {entry.name: entry for entry in ZOO}
every_entry = pytest.mark.parametrize("entry", ZOO, ids=str)
every_hf_entry = pytest.mark.parametrize("entry", [e for e in ZOO if e.kind != "plain"], ids=str)
some_entries = pytest.mark.parametrize(
    "entry", [BY_NAME[name] for name in ("llama", "gemma2", "gpt2", "bert", "t5", "gpt_oss")], ids=str
)

Gradients = dict[str, Tensor | None]


def gradients(entry: Entry, model: nn.Module, inputs: dict[str, Any]) -> Gradients:
    """Return every parameter's gradient of a loss that depends on every output that is not padding."""
    model.train()
    model.zero_grad()
    output = entry.at_kept_positions(entry.output(model(**inputs)), inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weights.to(output.dtype)).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def in_float64(model: nn.Module) -> nn.Module:
    exact = copy.deepcopy(model).double()
    if hasattr(exact, "set_experts_implementation"):  # transformers 5: the default has no backward in float64
        exact.set_experts_implementation("eager")
    return exact


def gradients_in_float64(entry: Entry, model: nn.Module, inputs: dict[str, Any]) -> Gradients:
    exact = in_float64(model)
    with Float64():
        return gradients(entry, exact, upcast(inputs))


def assert_same_gradients(ours: Gradients, untouched: Gradients, exact: Gradients) -> None:
    assert {name for name, g in ours.items() if g is not None} == {n for n, g in untouched.items() if g is not None}
    present = [name for name, g in untouched.items() if g is not None]
    assert_as_accurate(
        [ours[name] for name in present],
        baseline=[untouched[name] for name in present],
        exact=[exact[name] for name in present],
        factor=GRADIENT_FACTOR,
        names=present,
    )


@functools.cache
def expected(entry: Entry, padding: str) -> tuple[Gradients, Gradients]:
    """The untouched model's gradients in fp32 and in float64."""
    inputs = entry.inputs(padding=padding)
    return gradients(entry, entry.build(), inputs), gradients_in_float64(entry, entry.build(), inputs)


@every_entry
def test_gradients_are_those_of_the_untouched_model(entry: Entry) -> None:
    padding = entry.paddings[-1]
    model = entry.build()
    llmkern.optimize_(model)
    assert_same_gradients(gradients(entry, model, entry.inputs(padding=padding)), *expected(entry, padding))
    llmkern.restore_(model)
    assert not any(isinstance(module, llmkern.swap.derive.Swapped) for module in model.modules())


@every_hf_entry
def test_gradient_checkpointing_gives_the_same_gradients(entry: Entry) -> None:
    padding = entry.paddings[-1]
    inputs = entry.inputs(padding=padding)
    untouched, model = entry.build(), entry.build()
    assert model.supports_gradient_checkpointing
    llmkern.optimize_(model)
    for each in (untouched, model):
        each.gradient_checkpointing_enable()
    try:
        gradients(entry, untouched, inputs)
    except RuntimeError as error:  # transformers 4.57's own Whisper
        with pytest.raises(type(error), match=str(error)[:40]):
            gradients(entry, model, inputs)
        return
    assert_same_gradients(gradients(entry, model, inputs), *expected(entry, padding))


@pytest.mark.parametrize("entry", [e for e in ZOO if e.kind in ("decoder", "encoder")], ids=str)
def test_gradients_reach_the_input_embeddings(entry: Entry) -> None:
    ids = entry.inputs()["input_ids"]

    def gradient(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        table = model.get_input_embeddings().weight.detach()
        embeddings = table[ids].to(dtype).requires_grad_()
        model(inputs_embeds=embeddings).logits.square().mean().backward()
        return embeddings.grad

    untouched, optimized, exact = entry.build(), entry.build(), in_float64(entry.build())
    llmkern.optimize_(optimized)
    with Float64():
        correct = gradient(exact, torch.float64)
    assert_as_accurate(gradient(optimized), baseline=gradient(untouched), exact=correct, factor=GRADIENT_FACTOR)


@every_entry
def test_dropout_is_not_dropped(entry: Entry) -> None:
    """With only attention's dropout on, two draws differ, and each is what the untouched model draws."""
    inputs = entry.inputs()
    model = entry.build(dropout=0.5)
    for module in model.modules():
        if _is_attention(module):
            continue
        for child in module.children():
            if isinstance(child, nn.Dropout):
                child.p = 0.0
        for name in ("dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)

    def draws(model: nn.Module) -> list[Tensor]:
        found = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            found.append(entry.output(model.train()(**inputs)).detach())
        return found

    first, second = draws(model)
    assert not torch.equal(first, second)
    llmkern.optimize_(model)
    again, other = draws(model)
    assert not torch.equal(again, other)
    torch.testing.assert_close(again, first, rtol=1e-4, atol=1e-4)  # the same draw of the same dropout


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__


@some_entries
@pytest.mark.parametrize("first", ["optimize", "adapt"])
def test_an_adapter_trains(entry: Entry, first: str) -> None:
    inputs = entry.inputs(padding=entry.paddings[-1])
    untouched = adapt(entry.build())
    if first == "optimize":
        model = entry.build()
        llmkern.optimize_(model)
        model = adapt(model)
    else:
        model = adapt(entry.build())
        assert llmkern.report(llmkern.optimize_(model)).swap.swapped
    correct = gradients_in_float64(entry, untouched, inputs)
    ours, theirs = gradients(entry, model, inputs), gradients(entry, untouched, inputs)
    assert ours
    assert all("lora_" in name for name in ours)
    assert_same_gradients(ours, theirs, correct)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = entry.output(model.eval()(**inputs)).detach()
    optimizer.step()
    assert not torch.equal(entry.output(model(**inputs)).detach(), before)


def adapt(model: nn.Module) -> nn.Module:
    """LoRA on every linear layer, with weights that are not zero, so that every one of them gets a gradient."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return adapted
