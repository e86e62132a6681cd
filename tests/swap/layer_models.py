"""What the tests of whole layers share: small models, and what is recorded of a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import llmkern
from llmkern import dispatch
from llmkern.ops._layer_plan import plan_of

needs_kernels = pytest.mark.skipif(
    dispatch.implementation("layers_", "cpu").backend.missing is not None, reason="needs the CPU kernels"
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


def give_class(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.__class__ = type(type(module).__name__, (type(module),), {"forward": forward})


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


on_each_layer = pytest.mark.parametrize("index", range(2))


def named(*changes: Callable[[Any], None]) -> Any:
    return pytest.mark.parametrize("change", changes, ids=lambda change: change.__name__)


PARTS = (6, 1, 1, 2)  # a prompt, two steps, and a step of two tokens


def pieces(tokens: Tensor) -> list[Tensor]:
    return list(tokens.split(PARTS, dim=1))


PROMPT, *STEPS = pieces(TOKENS)
TOGETHER = ["all layers"]
APART = ["a layer"] * 2


class Layers:
    """Calls of `layers_`: for all layers by a plan, or for one by its parameters; whoever listens already hears of
    them too."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.outer = dispatch._state.recorder

    def served(self, op: str, call: dict[str, Any], *rest: Any) -> None:
        if op == "layers_":
            self.calls.append("a layer" if plan_of(call["parameters"]) is None else "all layers")
        if self.outer is not None:
            self.outer.served(op, call, *rest)

    def fell_back(self, *call: Any) -> None:
        if self.outer is not None:
            self.outer.fell_back(*call)


def whole_layers(function: Callable[[], Any]) -> list[str]:
    """The calls of `layers_`, of which torch was asked for as many as the dispatcher says."""
    layers = Layers()
    with (
        dispatch.recording(layers),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        function()
    native = [event for event in profile.events() if event.name == "llmkern::layers_"]
    assert len(native) >= len(layers.calls)  # some to no avail
    return layers.calls


@contextlib.contextmanager
def layers_alone() -> Iterator[None]:
    """Within the block a decoder's loop runs over its layers, whatever could compute them together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmkern.swap.layer_stack._elements", lambda *_: [])
        yield


class Sequence:
    """An untouched and an optimized model that are given the same tokens, each with a KVCache."""

    def __init__(self, untouched: Any, optimized: Any) -> None:
        self.models = untouched, optimized
        self.caches = [llmkern.KVCache(model.config) for model in self.models]

    def give(self, tokens: Tensor, **options: Any) -> list[str]:
        """The operators for whole layers that the optimized model called; its logits are those of the untouched."""
        logits = []

        def forward(model: Any, cache: Any) -> None:
            logits.append(model(tokens, past_key_values=cache, **options).logits)

        forward(self.models[0], self.caches[0])
        called = whole_layers(lambda: forward(self.models[1], self.caches[1]))
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
        return called

    def crop(self, tokens: int) -> None:
        for cache in self.caches:
            cache.crop(tokens)
