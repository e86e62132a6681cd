"""A causal language model's loss without its logits: the same loss and gradients, and logits where they are read."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import llmkern
from llmkern import dispatch
from llmkern.training import fuse_loss_, unfuse_loss_

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **options)).train()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Served:
    """A recorder of the ops that were called, and of the reasons of fallbacks."""

    def __init__(self) -> None:
        self.ops: list[str] = []
        self.reasons: list[str] = []

    def served(self, op: str, call: dict[str, Any], implementation: Any, start: float) -> None:
        self.ops.append(op)

    def fell_back(self, op: str, call: dict[str, Any], to: str, reason: str) -> None:
        self.reasons.append(reason)


def step(model: nn.Module, **more: Any) -> tuple[Any, dict[str, Tensor], Served]:
    """The outputs, the gradients by name, and what served them."""
    model.zero_grad()
    served = Served()
    with dispatch.recording(served):
        out = model(**batch(), **more)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, served


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": torch.tensor(40)}], ids=["mean", "num-items"])
@pytest.mark.parametrize("optimized", [False, True])
def test_loss_and_gradients_are_the_models_own(tied: bool, more: dict[str, Any], optimized: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    expected, theirs, _ = step(model, **more)
    if optimized:
        llmkern.optimize_(model)
    found, ours, served = step(fuse_loss_(model), **more)
    assert "linear_cross_entropy" in served.ops
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_logits_are_there_for_whoever_reads_them() -> None:
    model = llama()
    expected = model(**batch())
    fuse_loss_(model)
    for read in (
        lambda out: out.logits,
        lambda out: out["logits"],
        lambda out: out[1],
        lambda out: out.to_tuple()[1],
        lambda out: dict(out.items())["logits"],
        lambda out: copy.copy(out).logits,
    ):
        out = model(**batch())
        assert isinstance(out, type(expected))
        torch.testing.assert_close(read(out), expected.logits)
        torch.testing.assert_close(out.loss, expected.loss)
    out = model(**batch())
    assert out["loss"] is out[0] is out.loss
    assert "_llmkern_logits" in vars(out)  # none of these needed them
    assert type(model(**batch()).logits.grad_fn) is type(expected.logits.grad_fn)


def test_without_labels_or_gradients_nothing_changes() -> None:
    model = fuse_loss_(llama())
    ids = batch()["input_ids"]
    assert model(input_ids=ids).loss is None
    with torch.no_grad():
        out = model(**batch())
    assert "_llmkern_logits" not in vars(out)
    assert out.logits.shape == (2, 9, 97)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = llama()
    _, theirs, _ = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    _, ours, served = step(fuse_loss_(model))
    assert "linear_cross_entropy" in served.ops
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_autocast() -> None:
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch()).loss
        found = fuse_loss_(model)(**batch()).loss
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_a_model_that_changes_its_logits_is_left_alone() -> None:
    config = hf.Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=3.0)
    model = hf.Gemma2ForCausalLM(config).train()
    expected, theirs, _ = step(model)
    found, ours, served = step(fuse_loss_(model))
    assert served.reasons == ["the model changes its logits after its head"]
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(ours, theirs)


def test_what_it_cannot_serve_runs_untouched() -> None:
    for change, reason in (
        (
            lambda m: m.lm_head.register_forward_hook(lambda *_: None),
            "the output head has hooks or a forward of its own",
        ),
        (lambda m: setattr(m, "loss_function", lambda logits, **_: logits.sum()), "the model has a loss function"),
    ):
        model = fuse_loss_(llama())
        change(model)
        _, _, served = step(model)
        assert "linear_cross_entropy" not in served.ops
        assert served.reasons[0].startswith(reason)


def test_it_is_undone_copied_and_pickled() -> None:
    model = fuse_loss_(llama())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert twin(**batch()).loss.item() != pytest.approx(model(**batch()).loss.item())  # the copy is about itself
    pickle.loads(pickle.dumps(model))(**batch())
    assert "forward" not in vars(unfuse_loss_(model))
    with pytest.raises(TypeError, match="fuse_loss_: model is a Linear, expected a causal language model"):
        fuse_loss_(nn.Linear(2, 2))


def test_trainer(tmp_path: Any) -> None:
    """Two steps with accumulation: the parameters are those that the untouched model gets."""
    pytest.importorskip("accelerate")
    rows = [{name: value[i % 2] for name, value in batch().items()} for i in range(8)]

    def trained(model: nn.Module) -> dict[str, Tensor]:
        arguments = hf.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
            use_cpu=True, save_strategy="no", logging_strategy="no", seed=0, learning_rate=1e-2, optim="sgd",
        )  # fmt: skip
        hf.Trainer(model, arguments, train_dataset=rows).train()
        return {name: p.detach() for name, p in model.named_parameters()}

    torch.testing.assert_close(trained(fuse_loss_(llama())), trained(llama()), rtol=1e-4, atol=1e-5)
