"""A module like one that was probed before is not probed again; one that only looks like it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from layer_models import DECODER, TOKENS, built, give_class, layers_alone, needs_kernels, recorded
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import llmkern
from llmkern.swap import match
from llmkern.swap.rules import layer as rule

pytestmark = [pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning"), needs_kernels]


def model() -> Any:
    return built(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER | {"num_hidden_layers": 4})))


def test_layers_that_are_alike_are_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match, "_known", {})
    probed, own = [], rule.layer_program
    monkeypatch.setattr(rule, "layer_program", lambda module: probed.append(module) or own(module))
    for _ in range(2):  # and another model's like them not at all
        llmkern.optimize_(model())
    assert len(probed) == 1


def by_index(
    self: Any, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None, past_key_values: Any = None
) -> Any:
    """A Llama attention whose scale depends on where its layer is."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling * (self.layer_idx + 1))
    return self.o_proj(out.flatten(-2)), weights


def scales_by_index(layers: Any) -> None:
    for layer in layers:
        layer.self_attn.__class__ = Indexed


class Indexed(hf.models.llama.modeling_llama.LlamaAttention):
    def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None, **given: Any) -> Any:
        return by_index(self, hidden_states, position_embeddings, attention_mask, given.get("past_key_values"))


def scale_of_one(layers: Any) -> None:
    layers[2].self_attn.scaling = 2.0


def activation_of_one(layers: Any) -> None:
    layers[2].mlp.act_fn = nn.GELU(approximate="tanh")


def eps_of_one(layers: Any) -> None:
    layers[2].input_layernorm.variance_epsilon = layers[2].post_attention_layernorm.variance_epsilon = 0.5


def class_of_one(layers: Any) -> None:
    own = type(layers[2].mlp).forward
    give_class(layers[2].mlp, lambda self, x: 2 * own(self, x))


@pytest.mark.parametrize("change", [scales_by_index, scale_of_one, activation_of_one, eps_of_one, class_of_one])
@torch.no_grad()
def test_layers_that_differ(change: Any) -> None:
    untouched = model()
    before = untouched(TOKENS).logits
    change(untouched.model.layers)
    optimized = copy.deepcopy(untouched)
    llmkern.optimize_(optimized, on_unsupported="ignore")
    assert (untouched(TOKENS).logits - before).abs().max() > 0.01
    for use_cache in (False, True):
        out, expected = (each(TOKENS, use_cache=use_cache).logits for each in (optimized, untouched))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    with layers_alone():  # and every one is served: a class of another one's would have a guard that does not hold
        assert not recorded(lambda: optimized(TOKENS)).reasons


@torch.no_grad()
def test_a_norm_of_which_nothing_can_be_told() -> None:
    norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
    nn.init.zeros_(norms[0].weight)  # what it computes is zero, whatever its formula
    untouched = copy.deepcopy(norms)
    llmkern.optimize_(norms, on_unsupported="ignore")
    x = torch.randn(3, 8)
    for ours, theirs in zip(norms, untouched, strict=True):
        torch.testing.assert_close(ours(x), theirs(x))


@torch.no_grad()
def test_a_forward_rebound_earlier_keeps_no_old_globals(monkeypatch) -> None:
    """Two models of one class get one forward, but not where a global that it mentions was replaced in between."""
    config = hf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=67
    )
    untouched, ids = hf.LlamaForCausalLM(config).eval(), torch.arange(9)[None]
    llmkern.optimize_(copy.deepcopy(untouched), rope=False)
    rotate = llama.apply_rotary_pos_emb
    monkeypatch.setattr(llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: rotate(50 * q, k, cos, sin))
    model = llmkern.optimize_(copy.deepcopy(untouched), on_unsupported="ignore")
    torch.testing.assert_close(model(ids).logits, untouched(ids).logits)
