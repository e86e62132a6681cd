"""Attention and masks are swapped in the forwards that look them up: configs and masks stay what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from zoo import ZOO, Entry

import llmkern
from llmkern import dispatch

pytestmark = pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning")

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
WINDOW = 12
TOKENS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def gemma2() -> Any:
    torch.manual_seed(0)
    config = hf.Gemma2Config(**SIZES, sliding_window=WINDOW, attn_implementation="eager")
    return hf.Gemma2ForCausalLM(config).eval()


def llama(attention: str) -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, attn_implementation=attention)).eval()


class Masks(list):
    """What the attention op is told of masks, call by call: shape of the mask, "causal", window."""

    def served(self, op: str, call: dict[str, Any], *_: Any) -> None:
        if op == "attention":
            mask = call["attn_mask"]
            self.append((None if mask is None else mask.dtype, call["causal"], call["window"][0]))

    def fell_back(self, *_: Any) -> None:
        pass


def masks(model: nn.Module, **inputs: Tensor) -> Masks:
    seen = Masks()
    with dispatch.recording(seen):
        model(**inputs)
    return seen


def assert_alike(ours: nn.Module, theirs: nn.Module, **inputs: Any) -> None:
    kept = inputs.get("attention_mask", torch.ones(1)).bool()
    out, expected = (model(**inputs).logits for model in (ours, theirs))
    if "attention_mask" in inputs:
        out, expected = out[kept], expected[kept]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("entry", [e for e in ZOO if e.kind != "plain"], ids=str)
def test_every_config_stays_the_object_that_it_is(entry: Entry) -> None:
    def configs(model: nn.Module) -> list[Any]:
        found = [vars(m)["config"] for m in model.modules() if "config" in vars(m)]
        within = [getattr(c, name, None) for c in found for name in getattr(type(c), "sub_configs", {})]
        return [(id(c), type(c), getattr(c, "_attn_implementation", None)) for c in (*found, *within)]

    model = entry.build()
    before = configs(model)
    llmkern.optimize_(model)
    assert configs(model) == before


@torch.no_grad()
def test_a_decoder_under_eager_attention_makes_no_mask_that_says_nothing_new() -> None:
    untouched, model = gemma2(), gemma2()
    llmkern.optimize_(model, mlp=False)  # else the layers are computed as a whole, and the op is not called by itself
    # Gemma 2's layers have a window, and none, by turns; a window that no key falls out of is in no mask.
    assert masks(model, input_ids=TOKENS) == [(None, True, WINDOW - 1), (None, True, -1)]
    padded = torch.ones_like(TOKENS)
    padded[1, :3] = 0
    assert [mask for mask, _, _ in masks(model, input_ids=TOKENS, attention_mask=padded)] == [torch.bool] * 2
    long = torch.randint(3, 64, (1, 2 * WINDOW), generator=torch.Generator().manual_seed(1))
    assert [mask for mask, _, _ in masks(model, input_ids=long)] == [torch.bool, None]
    for inputs in ({"input_ids": TOKENS}, {"input_ids": TOKENS, "attention_mask": padded}, {"input_ids": long}):
        assert_alike(model, untouched, **inputs)


@pytest.mark.parametrize("path", ["model.layers.0.self_attn", "model.layers.1.self_attn"])
@torch.no_grad()
def test_an_attention_that_is_left_alone_is_given_the_masks_that_it_knows(path: str) -> None:
    untouched, model = gemma2(), gemma2()
    llmkern.optimize_(model, mlp=False, filter_fn=lambda _, at: at != path)
    (seen,) = masks(model, input_ids=TOKENS)
    assert seen[:2] == (torch.float32, False)
    assert_alike(model, untouched, input_ids=TOKENS)
    llmkern.optimize_(model, mlp=False)
    assert masks(model, input_ids=TOKENS)[0][0] is None
    assert_alike(model, untouched, input_ids=TOKENS)
    llmkern.optimize_(model)
    assert masks(model, input_ids=TOKENS) == []
    assert_alike(model, untouched, input_ids=TOKENS)


def other_class(attention: nn.Module) -> None:
    attention.__class__ = type(attention.__class__.__name__, (type(gemma2().model.layers[0].self_attn),), {})


def own_forward(attention: nn.Module) -> None:
    own = type(gemma2().model.layers[0].self_attn).forward
    attention.forward = lambda *args, **kwargs: own(attention, *args, **kwargs)  # type: ignore[method-assign]


def another(attention: nn.Module) -> None:
    """One that was never swapped, in its place."""


@pytest.mark.parametrize("change", [other_class, own_forward, another])
@torch.no_grad()
def test_an_attention_that_is_another_since(change: Any) -> None:
    untouched, model = gemma2(), gemma2()
    llmkern.optimize_(model)
    model(TOKENS)
    if change is another:
        model.model.layers[1].self_attn = gemma2().model.layers[1].self_attn
    else:
        change(model.model.layers[1].self_attn)
    assert_alike(model, untouched, input_ids=TOKENS)


@torch.no_grad()
def test_an_attention_class_that_is_replaced_since(monkeypatch: pytest.MonkeyPatch) -> None:
    untouched, model = gemma2(), gemma2()
    llmkern.optimize_(model)
    cls = type(untouched.model.layers[0].self_attn)
    own = cls.forward

    def scaled(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(self, 1.5 * hidden_states, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", scaled)
    assert_alike(model, untouched, input_ids=TOKENS)


@torch.no_grad()
def test_without_a_mask_eager_attention_sees_every_key() -> None:
    """Though the module says that it is causal: under sdpa that counts, under eager attention the mask alone."""
    untouched, model = llama("eager"), llama("eager")
    llmkern.optimize_(model, filter_fn=lambda _, path: path == "model.layers.0.self_attn")
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    angles = untouched.model.rotary_emb(x, torch.arange(5)[None])
    out, expected = (
        each.model.layers[0].self_attn(x, position_embeddings=angles, attention_mask=None)[0]
        for each in (model, untouched)
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_layer_that_is_called_without_a_mask(attention: str) -> None:
    """By itself a layer under eager attention sees every key; in a decoder that leaves masks out, those before it."""
    untouched, model = llama(attention), llama(attention)
    llmkern.optimize_(model.model.layers[0])
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    given = {"position_embeddings": untouched.model.rotary_emb(x, torch.arange(5)[None]), "attention_mask": None}
    out, expected = (each.model.layers[0](x, **given) for each in (model, untouched))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("first", "then"), [("sdpa", "eager"), ("eager", "sdpa")])
@torch.no_grad()
def test_an_attention_that_is_chosen_since_counts(first: str, then: str) -> None:
    untouched, model = llama(first), llama(first)
    llmkern.optimize_(model)
    for each in (untouched, model):
        each.set_attn_implementation(then)
    assert masks(model, input_ids=TOKENS) == []
    assert_alike(model, untouched, input_ids=TOKENS)


def test_a_loss_that_reads_padding_trains_as_untouched_under_eager_attention() -> None:
    """The last row of left padding predicts the first token: eager attention gives it the mean of all values."""
    ids = torch.randint(3, 60, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    gradients = []
    for optimized in (False, True):
        model = llama("eager")
        if optimized:
            llmkern.optimize_(model)
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
