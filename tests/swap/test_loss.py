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
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | options)).train()


def fused(model: nn.Module) -> nn.Module:
    """The model with nothing but its loss swapped."""
    others = dict.fromkeys(("attention", "norms", "mlp", "rope", "linear", "huge_pages"), False)
    return llmkern.optimize_(model, kv_cache=None, **others)


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
    found, ours, served = step(llmkern.optimize_(model) if optimized else fused(model), **more)
    assert "linear_cross_entropy" in served.ops
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_logits_are_there_for_whoever_reads_them() -> None:
    model = llama()
    expected = model(**batch())
    fused(model)
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
    model = fused(llama())
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
    _, ours, served = step(llmkern.optimize_(model))
    assert "linear_cross_entropy" in served.ops
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_autocast() -> None:
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch()).loss
        found = llmkern.optimize_(model)(**batch()).loss
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


class Loud(hf.LlamaForCausalLM):
    """Changes its logits in a way that only shows when it is asked for."""

    loud = False

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids=input_ids, attention_mask=kwargs.get("attention_mask")).last_hidden_state
        logits = self.lm_head(hidden)
        logits = 2 * logits if self.loud else logits
        return hf.modeling_outputs.CausalLMOutput(self.loss_function(logits, labels, self.vocab_size), logits)


def test_a_model_that_changes_its_logits_is_left_alone() -> None:
    config = hf.Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=3.0)
    model = llmkern.optimize_(hf.Gemma2ForCausalLM(config).train(), on_unsupported="error")
    (row,) = [row for row in llmkern.report(model).swap if row.kind == "loss"]
    assert (row.action, row.reason) == ("left", "the model changes its logits after its head")
    _, _, served = step(model)
    assert "linear_cross_entropy" not in served.ops
    model = Loud(hf.LlamaConfig(**SIZES)).train()
    expected, theirs, _ = step(model)
    _, ours, served = step(fused(model))
    assert "linear_cross_entropy" in served.ops
    torch.testing.assert_close(ours, theirs)
    model.loud = True  # since it was swapped
    found, _, served = step(model)
    assert served.reasons == ["the model changes its logits after its head"]
    assert found.loss.item() != pytest.approx(expected.loss.item())


def test_what_it_cannot_serve_runs_untouched() -> None:
    for change, reason in (
        (
            lambda m: m.lm_head.register_forward_hook(lambda *_: None),
            "the output head has hooks or a forward of its own",
        ),
        (lambda m: setattr(m, "loss_function", lambda logits, **_: logits.sum()), "the model has a loss function"),
        (lambda m: setattr(m, "lm_head", nn.Sequential(m.lm_head)), "the output head is a Sequential"),
    ):
        model = fused(llama())
        change(model)
        _, _, served = step(model)
        assert "linear_cross_entropy" not in served.ops
        assert served.reasons[0].startswith(reason)
    out = fused(llama())(**batch(), return_dict=False)
    assert out[1].shape == (2, 9, 97)


def test_it_is_undone_copied_and_pickled() -> None:
    model = fused(llama())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert twin(**batch()).loss.item() != pytest.approx(model(**batch()).loss.item())  # the copy is about itself
    pickle.loads(pickle.dumps(model))(**batch())
    assert type(llmkern.restore_(model)) is hf.LlamaForCausalLM
    assert type(llmkern.optimize_(llama(), loss=False)(**batch())) is hf.modeling_outputs.CausalLMOutputWithPast


def test_every_family_that_hands_its_logits_on_is_served() -> None:
    """Each class with a causal loss: its loss is fused, or the report says why not."""
    reasons = {}
    for config in (
        hf.LlamaConfig(**SIZES),
        hf.MistralConfig(**SIZES),
        hf.Qwen3Config(**SIZES, head_dim=16),
        hf.Gemma3TextConfig(**SIZES, head_dim=16),
        hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2),
        hf.OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2),
        hf.GPTNeoXConfig(**SIZES),
        hf.CohereConfig(**SIZES),
        hf.MixtralConfig(**SIZES, num_local_experts=2),
    ):
        model = fused(hf.AutoModelForCausalLM.from_config(config))
        rows = [row for row in llmkern.report(model).swap if row.kind == "loss"]
        reasons[config.model_type] = [row.reason for row in rows]
    scaled = reasons.pop("cohere")
    assert scaled == ["the model changes its logits after its head"]
    assert reasons == dict.fromkeys(reasons, [""])


def test_a_compiled_step_has_the_same_gradients() -> None:
    """The compiler has the logits: what it makes of them is its own."""
    model = llama(num_hidden_layers=1)
    _, theirs, _ = step(model)
    compiled = torch.compile(llmkern.optimize_(model), backend="aot_eager", fullgraph=True)
    model.zero_grad()
    compiled(**batch()).loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scheme", ["int8", "int4-g32"])
@pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning")
def test_adapters_train_over_quantized_weights(scheme: str) -> None:
    """Gradients of the adapters are near those over the weights that the codes stand for; steps lower the loss."""
    peft = pytest.importorskip("peft")
    codes = llmkern.quantize_(llama(hidden_size=64, intermediate_size=96), scheme)

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        return peft.get_peft_model(model, config).train()

    values = adapted(llmkern.dequantize_(copy.deepcopy(codes)))
    model = llmkern.optimize_(adapted(codes))
    _, theirs, _ = step(values)
    first, ours, served = step(model)
    assert "linear_cross_entropy" in served.ops
    assert set(ours) == set(theirs)
    assert all("lora_" in name for name in ours)
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 0.1 * theirs[name].norm(), name
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.step()
        last, _, _ = step(model)
    assert last.loss < first.loss


def test_packed_documents_train_as_separate_ones() -> None:
    model = llmkern.optimize_(llama())
    ids = batch()["input_ids"]
    first, second = ids[:1, :5], ids[1:]

    def gradients(calls: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        model.zero_grad()
        for call in calls:
            model(**call, use_cache=False, num_items_in_batch=torch.tensor(12)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    alone = gradients([{"input_ids": each, "labels": each} for each in (first, second)])
    packed = torch.cat([first, second], 1)
    positions = torch.tensor([[*range(5), *range(9)]])
    together = gradients(
        [{"input_ids": packed, "position_ids": positions, "labels": packed.masked_fill(positions == 0, -100)}]
    )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


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

    torch.testing.assert_close(trained(llmkern.optimize_(llama())), trained(llama()), rtol=1e-4, atol=1e-5)
