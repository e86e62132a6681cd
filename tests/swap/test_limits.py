"""Modules that compute what an op does until their values reach a limit: they must be left alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from layer_models import give_class, needs_kernels
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import llmkern

LIMITS = pytest.mark.parametrize("limit", [7.0, 10.0, 100.0])  # swiglu_limit, gelu_10 and clip_qkv are of these sizes


class ClippedGELU(nn.Module):
    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x).clamp(-self.limit, self.limit)


class ClippedSwiGLU(nn.Module):
    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x).clamp(max=self.limit), self.up_proj(x).clamp(-self.limit, self.limit)
        return self.down_proj(F.silu(gate) * up)


class ClippedRMSNorm(nn.Module):
    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit, self.eps = limit, 1e-6
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clamp(-self.limit, self.limit)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


@LIMITS
@pytest.mark.parametrize("kind", [ClippedGELU, ClippedSwiGLU, ClippedRMSNorm])
@torch.no_grad()
def test_a_part_with_a_limit(kind: type[nn.Module], limit: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(limit))
    untouched = copy.deepcopy(model)
    llmkern.optimize_(model, on_unsupported="ignore")
    x = torch.randn(2, 3, 8) * 1e4
    assert torch.equal(model(x), untouched(x))


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("cls", "config"),
    [(hf.LlamaModel, hf.LlamaConfig), (hf.BertModel, hf.BertConfig)],
    ids=["llama", "bert"],
)
@torch.no_grad()
def test_a_model_whose_activation_has_a_limit(cls: type, config: type) -> None:
    torch.manual_seed(0)
    model = cls(config(**SIZES, hidden_act="gelu_10")).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(100)  # far beyond the limit
    untouched = copy.deepcopy(model)
    report = llmkern.report(llmkern.optimize_(model, on_unsupported="ignore")).swap
    assert "gelu" not in {row.op for row in report.swapped}  # a layer's program says the limit; gelu cannot
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    ours, theirs = model(input_ids=tokens).last_hidden_state, untouched(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def attention_with(limit: float | None) -> Callable[..., Any]:
    """The forward of a Llama attention with a limit between the projections and the attention, as clip_qkv sets it."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **_: Any,
    ):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(hidden_states).view(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if limit is not None:
            q, k, v = (x.clamp(-limit, limit) for x in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling)
        return self.o_proj(out.flatten(-2)), weights

    return forward


@needs_kernels
@pytest.mark.parametrize(("limit", "whole"), [(None, True), (math.inf, False), (100.0, True), (10.0, True)])
@torch.no_grad()
def test_a_layer_whose_attention_has_a_limit(limit: float | None, whole: bool) -> None:
    torch.manual_seed(0)
    model = hf.LlamaModel(hf.LlamaConfig(**SIZES)).eval()
    for layer in model.layers:
        give_class(layer.self_attn, attention_with(limit))
        layer.self_attn.v_proj.weight.mul_(1e5)
    untouched = copy.deepcopy(model)
    report = llmkern.report(llmkern.optimize_(model, on_unsupported="ignore")).swap
    assert ("layers_" in {row.op for row in report.swapped}) == whole
    tokens = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    ours, theirs = (m(input_ids=tokens, use_cache=False).last_hidden_state for m in (model, untouched))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
