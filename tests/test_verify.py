"""verify: the numbers, the verdict, and that nothing is left behind."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from llmkern.testing.float64 import Float64
from llmkern.verify import Accuracy, verify

VOCAB = 61


class TinyLM(nn.Module):
    """Embedding, dropout, one norm and a head; `wrap` gives the form of the output."""

    def __init__(self, wrap=lambda logits: logits, hidden: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, hidden)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, VOCAB)
        self.wrap = wrap

    def forward(self, input_ids, attention_mask=None):
        return self.wrap(self.head(self.norm(self.dropout(self.embedding(input_ids)))))


def logits_of(value):
    return {"logits": value, "attentions": None}


@pytest.fixture
def ids() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(0, VOCAB, (2, 9))


def pair(wrap=logits_of, dtype=torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    reference = TinyLM(wrap).to(dtype)
    return copy.deepcopy(reference), reference


def perturb(model: nn.Module, size: float) -> None:
    with torch.no_grad():
        model.head.weight.add_(size * torch.randn_like(model.head.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_is_within_the_rule_with_no_difference(ids, dtype) -> None:
    accuracy = verify(*pair(dtype=dtype), input_ids=ids)
    assert accuracy.verdict
    assert (accuracy.max_abs, accuracy.rel, accuracy.kl, accuracy.top1) == (0.0, 0.0, 0.0, 1.0)
    assert accuracy.error == accuracy.reference_error > 0
    assert (accuracy.output, accuracy.positions) == ("logits", 18)


def test_numbers_are_those_of_their_definitions(ids) -> None:
    model, reference = pair()
    perturb(model, 0.3)
    accuracy = verify(model, reference, input_ids=ids)
    out, want = (m.eval()(ids)["logits"].detach().double() for m in (model, reference))
    assert accuracy.max_abs == pytest.approx(float((out - want).abs().max()))
    assert accuracy.rel == pytest.approx(float((out - want).norm() / want.norm()))
    kl = nn.functional.kl_div(out.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="sum") / 18
    assert accuracy.kl == pytest.approx(float(kl))
    assert accuracy.top1 == pytest.approx(float((out.argmax(-1) == want.argmax(-1)).double().mean()))
    assert not accuracy.verdict
    assert accuracy.error > accuracy.allowed
    assert accuracy.sentence.startswith("outside the rule")


def test_error_is_measured_against_the_reference_in_float64(ids) -> None:
    model, reference = pair(dtype=torch.bfloat16)
    exact = copy.deepcopy(reference).double().eval()(ids)["logits"]
    accuracy = verify(model, reference, input_ids=ids)
    own = float((reference.eval()(ids)["logits"] - exact).detach().abs().max())
    assert accuracy.reference_error == pytest.approx(own, rel=1e-6)


@pytest.mark.parametrize(
    ("wrap", "output"),
    [
        (logits_of, "logits"),
        (lambda t: {"last_hidden_state": t, "pooler_output": t[:, 0]}, "last_hidden_state"),
        (lambda t: t, "output"),
        (lambda t: (t.argmax(-1), t), "output 1"),
        (lambda t: {"text_embeds": t}, "text_embeds"),
    ],
)
def test_every_form_of_output(ids, wrap, output) -> None:
    accuracy = verify(*pair(wrap), input_ids=ids)
    assert accuracy.output == output
    assert accuracy.verdict
    assert (accuracy.kl is None) == (output != "logits")


def test_the_worst_of_several_outputs_is_reported(ids) -> None:
    model, reference = pair(lambda t: (t, t))
    model.wrap = lambda t: (t, t + 1)
    accuracy = verify(model, reference, input_ids=ids)
    assert (accuracy.output, accuracy.verdict) == ("output 1", False)
    assert accuracy.max_abs == pytest.approx(1.0)


class Spoiled(TinyLM):
    """Wrong at the padded positions only."""

    def forward(self, input_ids, attention_mask=None):
        logits = super().forward(input_ids)["logits"]
        return {"logits": logits.masked_fill(attention_mask[..., None] == 0, math.nan)}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(ids, side) -> None:
    _, reference = pair()
    model = Spoiled(logits_of)
    model.load_state_dict(reference.state_dict())
    mask = torch.ones_like(ids)
    mask[0, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    accuracy = verify(model, reference, input_ids=ids, attention_mask=mask)
    assert accuracy.verdict
    assert accuracy.positions == 14


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers_fail(ids, value) -> None:
    model, reference = pair()
    with torch.no_grad():
        model.head.bias[3] = value
    accuracy = verify(model, reference, input_ids=ids)
    assert not accuracy.verdict
    assert accuracy.sentence == (
        "outside the rule: 18 of 1098 values of logits are NaN or infinite, unlike in the reference"
    )
    assert json.loads(json.dumps(accuracy.to_dict(), allow_nan=False))["max_abs"] is None
    alike = verify(copy.deepcopy(model), model, input_ids=ids)
    assert not alike.verdict


def test_nothing_is_left_behind(ids) -> None:
    model, reference = pair()
    model.train()
    reference.eval()
    reference.norm.train()
    modes = [[m.training for m in each.modules()] for each in (model, reference)]
    states = [{k: v.clone() for k, v in each.state_dict().items()} for each in (model, reference)]
    verify(model, reference, input_ids=ids)
    assert [[m.training for m in each.modules()] for each in (model, reference)] == modes
    for each, state in zip((model, reference), states, strict=True):
        for name, value in each.state_dict().items():
            assert value.dtype == state[name].dtype
            assert torch.equal(value, state[name])
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in each.modules())


def test_modes_come_back_when_a_forward_fails(ids) -> None:
    model, reference = pair()
    model.train()
    with pytest.raises(IndexError):
        verify(model, reference, input_ids=ids + VOCAB)
    assert model.training
    assert model.dropout.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, r: (m, m), "model is the reference itself"),
        (lambda m, r: (TinyLM(lambda t: logits_of(t[:, :-1])), r), r"logits of model has shape \[2, 8, 61\], expected"),
        (lambda m, r: (TinyLM(lambda t: t), r), "model returns output, the reference logits"),
        (lambda m, r: (m.to("meta"), r), "on the meta device, expected a model with loaded weights"),
        (lambda m, r: (TinyLM(lambda t: "text"), r), "the forward returned str, expected"),
    ],
)
def test_bad_input_is_one_line(ids, change, message) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        verify(*change(*pair()), input_ids=ids)
    assert "\n" not in str(caught.value)


def test_no_inputs() -> None:
    with pytest.raises(ValueError, match="no inputs were given"):
        verify(*pair())


def test_prints_as_a_table(ids) -> None:
    accuracy = verify(*pair(), input_ids=ids)
    assert isinstance(accuracy, Accuracy)
    text = str(accuracy)
    assert "top-1 agreement" in text
    assert text.endswith(accuracy.sentence)


def test_compiled_models_are_judged_too(ids) -> None:
    compiled = [torch.compile(model, backend="eager") for model in pair()]
    accuracy = verify(*compiled, input_ids=ids)
    plain = verify(*pair(), input_ids=ids)
    assert (accuracy.verdict, accuracy.reference_error) == (True, plain.reference_error)


class Caching(TinyLM):
    """Reads the length of the cache that it was given, and grows it."""

    def forward(self, input_ids, past_key_values=None):
        logits = super().forward(input_ids)["logits"] + len(past_key_values)
        past_key_values.append(logits)
        return {"logits": logits}


def test_a_cache_among_the_inputs_is_not_shared_by_the_runs(ids) -> None:
    torch.manual_seed(1)
    reference = Caching(logits_of)
    cache = [torch.ones(1)]
    accuracy = verify(copy.deepcopy(reference), reference, input_ids=ids, past_key_values=cache)
    assert (accuracy.max_abs, accuracy.verdict, len(cache)) == (0.0, True, 1)


def test_a_decoders_output_has_the_decoders_padding(ids) -> None:
    model, reference = pair()
    model.config = reference.config = type("Config", (), {"is_encoder_decoder": True})()
    perturb(model, 1.0)
    for each in (model, reference):
        each.forward = lambda input_ids, _own=each, **_: TinyLM.forward(_own, input_ids)
    encoder, decoder = torch.zeros_like(ids), torch.ones_like(ids)
    decoder[0, 5:] = 0
    accuracy = verify(model, reference, input_ids=ids, attention_mask=encoder, decoder_attention_mask=decoder)
    assert accuracy.positions == 14


class Dot(nn.Module):
    """One long sum, forwards or backwards: its error is a matter of luck."""

    def __init__(self, order: int = 1) -> None:
        super().__init__()
        self.weight, self.order = nn.Parameter(torch.ones(4096)), order

    def forward(self, x):
        total = torch.zeros_like(x[..., :8])
        for part in (x * self.weight).split(8, -1)[:: self.order]:
            total = total + part
        return total.sum(-1, keepdim=True)


def test_the_luck_of_the_reference_decides_nothing() -> None:
    """Where PyTorch's sum is right by chance, another order is not wrong; less precision is."""
    lucky = 0
    for seed in range(20):
        x = torch.randn(1, 4096, generator=torch.Generator().manual_seed(seed))
        accuracy = verify(Dot(-1), Dot(), x=x)
        lucky += accuracy.error > accuracy.allowed
        assert accuracy.verdict, accuracy
    assert lucky


def test_less_precision_is_no_bad_luck(ids) -> None:
    model, reference = pair()
    model.head.weight.data = model.head.weight.data.to(torch.float16).float()
    accuracy = verify(model, reference, input_ids=ids)
    assert not accuracy.verdict
    assert accuracy.sentence.startswith("outside the rule")


class TestFloat64:
    """The mode that computes the exact result."""

    def test_equals_a_float64_copy(self) -> None:
        torch.manual_seed(2)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).bfloat16().eval()
        x = torch.randn(2, 5, 16, dtype=torch.bfloat16)
        with torch.no_grad():
            with Float64():
                got = layer(x)
            want = copy.deepcopy(layer).double()(x.double())
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert all(p.dtype == torch.bfloat16 for p in layer.parameters())

    def test_casts_to_a_narrower_dtype_become_float64(self) -> None:
        x = torch.full((3,), 1 / 3, dtype=torch.float64)
        with Float64():
            assert torch.equal(x.float(), x)
            assert torch.softmax(x, -1, dtype=torch.float32).dtype == torch.float64
            assert torch.zeros(2).dtype == torch.float64
            assert x.long().dtype == torch.int64

    def test_writes_keep_the_dtype_of_what_existed(self) -> None:
        buffer, wide = torch.zeros(4), torch.ones(2, dtype=torch.float64)
        with Float64():
            buffer[1:3] = wide
            buffer.index_put_((torch.tensor([0]),), wide[:1])
        assert buffer.dtype == torch.float32
        assert buffer.tolist() == [1, 1, 1, 0]

    def test_convolution_and_experts(self) -> None:
        torch.manual_seed(3)
        conv, x = nn.Conv1d(2, 3, 3), torch.randn(1, 2, 7)
        tokens, experts = torch.randn(5, 4), torch.randn(2, 4, 3)
        with torch.no_grad(), Float64():
            convolved = conv(x.double())
            mixed = nn.functional.grouped_mm(tokens, experts, offs=torch.tensor([2, 5], dtype=torch.int32))
        torch.testing.assert_close(convolved, copy.deepcopy(conv).double()(x.double()))
        want = torch.cat([tokens[:2].double() @ experts[0].double(), tokens[2:].double() @ experts[1].double()])
        torch.testing.assert_close(mixed, want)
