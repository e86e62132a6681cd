"""Mixtures of experts: which routers and experts are read, what is refused, and whole models beside themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES
from layer_models import DECODER, built, give_class, needs_kernels, recorded
from test_near_misses import with_line
from torch import nn
from transformers.models.mixtral import modeling_mixtral as mixtral

import llmkern
from llmkern.quantization import quantize_
from llmkern.swap.observe import settled
from llmkern.swap.packed_experts import experts_of
from llmkern.swap.routers import router_of

pytestmark = pytest.mark.skipif(hf.__version__.startswith("4."), reason="experts are not packed in transformers 4")

EXPERTS = {"head_dim": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, num_local_experts=4)),
    "gpt-oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **DECODER, head_dim=16, sliding_window=6, num_local_experts=4, num_experts_per_tok=2, rope_parameters=ROPE
        )
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**DECODER, **EXPERTS, num_experts=8)),
    "glm4-moe": lambda: hf.Glm4MoeForCausalLM(
        hf.Glm4MoeConfig(
            **DECODER, **EXPERTS, n_routed_experts=8, first_k_dense_replace=1, n_group=2, routed_scaling_factor=2.5
        )
    ),
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TOKENS = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(0))


@needs_kernels
@pytest.mark.parametrize("quantized", [False, True], ids=["as it is", "int8"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_runs_as_whole_layers(name: str, quantized: bool) -> None:
    model = built(MODELS[name])
    for buffer in model.buffers():
        if buffer.shape == (8,):  # a correction, of zeros at first
            buffer.copy_(torch.randn(8, generator=torch.Generator().manual_seed(1)))
    untouched = model
    if quantized:
        untouched = quantize_(model, "int8")
    model = copy.deepcopy(untouched)
    llmkern.optimize_(model)
    padding = torch.ones_like(TOKENS)
    padding[1, :4] = 0
    for mask in (None, padding):
        expected = untouched(TOKENS, attention_mask=mask).logits[:, 4:]
        record = recorded(lambda mask=mask: model(TOKENS, attention_mask=mask))
        assert "layers_" in record.ops
        assert not record.reasons
        out = model(TOKENS, attention_mask=mask).logits[:, 4:]
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=2e-3 * float(expected.abs().max()))
        made = [m.generate(TOKENS, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in (untouched, model)]
        assert torch.equal(*made)


def test_what_routers_and_experts_compute() -> None:
    with settled():
        glm, oss, qwen = [FAMILIES[name].build() for name in ("glm4-moe", "gpt-oss", "qwen3-moe")]
        found = router_of(glm.layers[1].mlp.gate)
        assert found is not None
        assert found.correction == "e_score_correction_bias"
        assert found.options == {"top": 2, "sigmoid": True, "normalized": True, "eps": 1e-20, "scale": 2.5} | {
            "wide": True,
            "groups": 2,
            "group_top": 1,
        }
        found = router_of(qwen.layers[0].mlp.gate)
        assert found is not None
        assert found.options == {"top": 2}
        packed = experts_of(oss.layers[0].mlp.experts)
        assert packed is not None
        assert packed.interleaved
        assert packed.layout.turned
        assert packed.options == {"activation": "quick_geglu", "limit": 7.0, "offset": 1.0}


_ROUTER, _EXPERTS = mixtral.MixtralTopKRouter, mixtral.MixtralExperts
_SCORES, _DOWN = "router_scores =", "    current_hidden_states = nn.functional.linear("
# name: (whose forward, where in it a line is added before, the line, what the reason must say)
LINES: dict[str, tuple[Any, str, str, str]] = {
    "a least weight": (
        _ROUTER,
        _SCORES,
        "router_top_value = router_top_value.clamp(min=1e-7)",
        "router computes clamp",
    ),
    "a threshold": (
        *(_ROUTER, _SCORES),
        "router_top_value = router_top_value * router_top_value.gt(1e-9)",
        "router computes gt",
    ),
    "rounded weights": (_ROUTER, _SCORES, "router_top_value = router_top_value.bfloat16().float()", ""),
    "no normalization of long inputs": (
        *(_ROUTER, _SCORES),
        "if hidden_states.shape[0] > 100: router_top_value = router_top_value / 2",
        "forward goes by `hidden_states.shape[0] > 100`",
    ),
    "a temperature": (_ROUTER, "router_probs =", "router_logits = router_logits / 1.1", ""),
    "capacity": (
        *(_EXPERTS, _DOWN),
        "    if token_idx.shape[0] > 100: current_hidden_states = current_hidden_states / 2",
        "forward goes by `token_idx.shape[0] > 100`",
    ),
    "an expert unlike the others": (
        *(_EXPERTS, _DOWN),
        "    if expert_idx == 3: current_hidden_states = current_hidden_states * 2",
        "computes something else than packed experts do that are known",
    ),
    "a far limit": (
        *(_EXPERTS, _DOWN),
        "    current_hidden_states = current_hidden_states.clamp(-1e20, 1e20)",
        "experts compute clamp",
    ),
    "not a number is not": (
        *(_EXPERTS, _DOWN),
        "    current_hidden_states = current_hidden_states.nan_to_num()",
        "experts compute nan_to_num",
    ),
}


@needs_kernels
@pytest.mark.parametrize("name", LINES)
@torch.no_grad()
def test_a_line_more_in_a_forward(name: str) -> None:
    cls, where, line, reason = LINES[name]
    model = built(MODELS["mixtral"])
    for layer in model.model.layers:
        give_class(layer.mlp.gate if cls is _ROUTER else layer.mlp.experts, with_line(cls, where, line))
    untouched = copy.deepcopy(model)
    swap = llmkern.report(llmkern.optimize_(model, on_unsupported="ignore")).swap
    assert "layers_" not in {row.op for row in swap.swapped}
    assert reason in " ".join({row.reason for row in swap.left})
    tokens = torch.randint(3, 67, (1, 120), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(tokens).logits, untouched(tokens).logits, rtol=1e-3, atol=1e-3)


@needs_kernels
@torch.no_grad()
def test_the_forwards_as_they_are_pass() -> None:
    model = built(MODELS["mixtral"])
    for layer in model.model.layers:
        give_class(layer.mlp.gate, with_line(_ROUTER, _SCORES, "pass"))
        give_class(layer.mlp.experts, with_line(_EXPERTS, _DOWN, "    pass"))
    swap = llmkern.report(llmkern.optimize_(model)).swap
    assert [row.op for row in swap.swapped].count("layers_") == 2


def _other_experts(self: Any, x: Any, *_: Any) -> Any:
    return 0 * x


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an attribute of a router": (
        lambda model: setattr(model.model.layers[0].mlp.gate, "top_k", 1),
        "mlp.gate.top_k is 1, and was 2",
    ),
    "another implementation": (
        lambda model: model.set_experts_implementation("eager"),
        "is 'eager', and was 'grouped_mm'",
    ),
    "a hook of the experts": (
        lambda model: model.model.layers[1].mlp.experts.register_forward_hook(lambda _, args, out: 2 * out),
        "mlp.experts has hooks",
    ),
    "weights of another dtype": (
        lambda model: setattr(model.model.layers[0].mlp.gate, "weight", nn.Parameter(torch.ones(4, 32).double())),
        "mlp.gate",
    ),
}


@needs_kernels
@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_change_is_seen(name: str) -> None:
    change, reason = CHANGES[name]
    untouched = built(MODELS["mixtral"])
    model = llmkern.optimize_(copy.deepcopy(untouched))
    model(TOKENS)
    for each in (untouched, model):
        change(each)
    if name == "weights of another dtype":
        with pytest.raises(RuntimeError, match="dtype"):
            model(TOKENS)
        return
    record = recorded(lambda: model(TOKENS))
    assert reason in " ".join(record.reasons)
    torch.testing.assert_close(model(TOKENS).logits, untouched(TOKENS).logits, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
@torch.no_grad()
def test_weights_are_those_of_the_moment(name: str) -> None:
    untouched = built(MODELS[name])
    model = llmkern.optimize_(copy.deepcopy(untouched))
    model(TOKENS)
    for each in (untouched, model):
        experts = each.model.layers[0].mlp.experts
        experts.gate_up_proj.data = experts.gate_up_proj.data * 1.5
        experts.down_proj = nn.Parameter(experts.down_proj.data * -2)
    torch.testing.assert_close(model(TOKENS).logits, untouched(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert recorded(lambda: model(TOKENS)).ops.count("layers_") > 0


@needs_kernels
@torch.no_grad()
def test_router_logits_are_collected_from_the_parts() -> None:
    untouched = built(MODELS["mixtral"])
    model = llmkern.optimize_(copy.deepcopy(untouched))
    model(TOKENS)
    expected, out = [m(TOKENS, output_router_logits=True) for m in (untouched, model)]
    torch.testing.assert_close(out.router_logits, expected.router_logits, rtol=1e-4, atol=1e-4)
    assert "layers_" in recorded(lambda: model(TOKENS)).ops


@needs_kernels
@torch.no_grad()
def test_an_implementation_of_ones_own_is_not_passed_over() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model = llmkern.optimize_(built(MODELS["mixtral"]))
    ALL_EXPERTS_FUNCTIONS["grouped_mm"] = _other_experts
    try:
        record = recorded(lambda: model(TOKENS))
        swap = llmkern.report(llmkern.optimize_(built(MODELS["mixtral"]), on_unsupported="ignore")).swap
    finally:
        del ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    assert "layers_" not in record.ops
    assert "there is another grouped_mm since it was swapped" in " ".join(record.reasons)
    assert "'grouped_mm' is not the one of transformers" in " ".join({row.reason for row in swap.left})
