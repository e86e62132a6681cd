"""What the tests of whole layers share: small models, and what is recorded of a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import llmkern
from llmkern import dispatch

needs_kernels = pytest.mark.skipif(
    dispatch.implementation("decoder_layer_", "cpu").backend.missing is not None, reason="needs the CPU kernels"
)

SIZES = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
DECODER = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
DECODER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
WINDOW = 6

DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER, sliding_window=WINDOW)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**DECODER, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=16)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**DECODER)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**DECODER, head_dim=16, tie_word_embeddings=False)),
}


def built(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else parameter.data.add_(
                0.3 * torch.randn(parameter.shape)
            )
    return model.to(dtype).eval()


def optimized(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> Any:
    model = built(make, dtype)
    llmkern.optimize_(model)
    return model


class Record:
    """Ops that were served, and reasons for leaving a layer to its parts."""

    def __init__(self) -> None:
        self.ops: list[str] = []
        self.reasons: list[str] = []

    def served(self, op: str, *_: Any) -> None:
        self.ops.append(op)

    def fell_back(self, op: str, call: dict[str, Any], to: str, reason: str) -> None:
        self.reasons.append(reason)


def recorded(function: Callable[[], Any]) -> Record:
    record = Record()
    with dispatch.recording(record):
        function()
    return record


TOKENS = torch.randint(3, 67, (2, 10), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones(2, 10, dtype=torch.long)
PADDED[1, :4] = 0
decoders = pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS)
