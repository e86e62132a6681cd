from __future__ import annotations

import copy

import pytest
import torch
from torch import nn


@pytest.fixture
def tiny_llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    # A few loud channels that the weights expect, as trained models have: there is something to smooth.
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, users in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                for channel, loudness in ((3, 30), (17, 11)):
                    norm.weight[channel] *= loudness
                    for user in users:
                        user.weight[:, channel] /= loudness
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(128, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def unchanged():
    """`unchanged(model)` remembers classes, tensors and config; calling the result asserts that they are the same."""

    def remember(model: nn.Module):
        modules, state, config = _snapshot(model)

        def check() -> None:
            modules_now, state_now, config_now = _snapshot(model)
            assert modules_now == modules
            assert config_now == config
            assert state_now.keys() == state.keys()
            for name, value in state.items():
                assert torch.equal(state_now[name], value), name

        return check

    return remember


def _snapshot(model: nn.Module) -> tuple:
    config = getattr(model, "config", None)
    return (
        [(path, type(module), id(module)) for path, module in model.named_modules()],
        {name: value.clone() for name, value in model.state_dict().items()},
        copy.deepcopy(config.to_dict()) if config is not None else None,
    )
