"""Models as a worker runs them: their specification, and the runners of transformers models.

A runner of a causal model has `prefill(ids)`, which ends with the first new token, `decode()`, which adds one more,
and `logits(ids)`; one of an encoder has `embed(ids)`.  Greedy choice, no stop token, so that all do the same work.
"""

from __future__ import annotations

import copy
import importlib.resources
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmkern.cli.arguments import dtype_named
from llmkern.cli.models import Loaded, load, quantize
from llmkern.swap import optimize_

__all__ = ["Runner", "Spec", "config_names", "kind_of", "optimized_runner", "published_config", "transformers_runner"]

_CONFIGS = importlib.resources.files("llmkern.bench") / "models"


@dataclass(frozen=True)
class Spec:
    """A worker's model and variant.  model: MODEL of the command line, or None for random weights of `config`'s shape.

    layers: of the model, as many are kept; None for all.
    """

    model: str | None
    config: str | None
    kind: str
    dtype_name: str
    device_name: str
    batch: int
    prompt_len: int
    new_tokens: int
    threads: int
    layers: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return dtype_named(self.dtype_name)

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_name)

    @property
    def capacity(self) -> int:
        """Tokens that a sequence may reach."""
        return self.prompt_len + self.new_tokens


class Runner(Protocol):
    """One variant, loaded."""

    def prefill(self, ids: Tensor) -> None:
        """ids [batch, prompt_len]: begin anew, up to and with the choice of the first token."""

    def decode(self) -> None:
        """One more token for each sequence."""

    def logits(self, ids: Tensor) -> Tensor:
        """ids [tokens] → fp32 [tokens, vocabulary]."""

    def embed(self, ids: Tensor) -> Tensor:
        """ids [batch, prompt_len] → [batch, hidden], of length 1 each."""


def config_names() -> list[str]:
    """The published shapes that there are."""
    return sorted(entry.name.removesuffix(".json") for entry in _CONFIGS.iterdir() if entry.name.endswith(".json"))


def published_config(name: str) -> Any:
    """transformers' config of a published shape."""
    from transformers import AutoConfig

    if name not in config_names():
        raise ValueError(f"--config: unknown shape {name!r}; there are {', '.join(config_names())}")
    values = json.loads((_CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return AutoConfig.for_model(values.pop("model_type"), **values)


def kind_of(config: Any) -> str:
    """ "causal" or "encoder"; ValueError for what the suite does not run."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} models are encoder-decoders; causal models and encoders are measured")
    names = " ".join(config.architectures or ())
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and ("CausalLM" in names or "LMHead" in names or not names):
        return "causal"
    return "encoder"


def loaded_model(spec: Spec, *, packed: bool = False) -> Loaded:
    if spec.model is not None:
        loaded = load(spec.model, dtype=spec.dtype_name, device=spec.device_name, packed=packed)
        if spec.layers is not None:
            _keep_layers(loaded.model, spec.layers)
        return loaded
    return Loaded(str(spec.config), _random_model(spec), None)


def _keep_layers(model: Any, layers: int) -> None:
    """Take all but the first layers out of a decoder."""
    count = model.config.num_hidden_layers
    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    del stack[layers:]
    model.config.num_hidden_layers = len(stack)


def _random_model(spec: Spec) -> nn.Module:
    """Laid out on the meta device, then filled on the device itself: no copy on the CPU, none in fp32."""
    from transformers import AutoModel, AutoModelForCausalLM

    family = AutoModelForCausalLM if spec.kind == "causal" else AutoModel
    config = published_config(str(spec.config))
    with torch.device("meta"):
        model = family.from_config(config, dtype=spec.dtype)
    model.to_empty(device=spec.device)
    model.tie_weights()
    generator = torch.Generator(spec.device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        # Buffers that no checkpoint has are made by a model of one layer on the device itself.
        shallow = copy.deepcopy(config)
        shallow.num_hidden_layers = 1
        with torch.device(spec.device):
            small = dict(family.from_config(shallow, dtype=spec.dtype).named_buffers())
        for name, buffer in model.named_buffers():
            if name in small:
                buffer.copy_(small[name])
    return model.eval()


class TransformersRunner:
    """Forward passes of the model itself: what `generate` adds around them in Python is the same for all."""

    def __init__(self, model: nn.Module, spec: Spec, forward: Callable[..., Any], cache: Callable[[], Any]) -> None:
        self.model, self.spec, self.forward, self.cache = model, spec, forward, cache
        self.past: Any = None
        self.next = torch.empty(0)

    def prefill(self, ids: Tensor) -> None:
        self.past = self.cache()
        self._step(ids, 0)

    def decode(self) -> None:
        self._step(self.next, self.length)

    def _step(self, ids: Tensor, start: int) -> None:
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        out = self.forward(
            input_ids=ids, past_key_values=self.past, use_cache=True, position_ids=positions, logits_to_keep=1
        )
        self.length = start + ids.shape[1]
        self.past = out.past_key_values
        self.next = out.logits[:, -1].argmax(-1, keepdim=True)

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids[None], use_cache=False).logits[0].float()

    def embed(self, ids: Tensor) -> Tensor:
        hidden = self.forward(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return nn.functional.normalize(hidden.float().mean(1), dim=-1)


class TrainingRunner:
    """Steps of AdamW, as somebody's own loop makes them."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        self.model, self.forward = model.train(), forward
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def train(self, ids: Tensor) -> None:
        """ids [batch, prompt_len]: forward with the model's own loss, backward, a step of the optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        self._backward(ids)
        self.optimizer.step()

    def gradients(self, ids: Tensor) -> Tensor:
        """The first numbers of each parameter's gradient [n], in fp32."""
        self._backward(ids)
        found = [p.grad.flatten()[:4096].float() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad(set_to_none=True)
        return torch.cat(found)

    def _backward(self, ids: Tensor) -> None:
        self.forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def transformers_runner(
    spec: Spec,
    *,
    attention: str | None = None,
    compiled: str | None = None,
    change: Callable[[nn.Module, Loaded], nn.Module] = lambda model, loaded: model,
    cache: Callable[[Any], Any] | None = None,
    packed: bool = False,
) -> Any:
    """The model, changed by `change`; of kind "training" its training.

    compiled: torch.compile's backend.  cache: takes the config, makes a key-value cache; transformers' own without.
    packed: whether the blocks of a .gguf file are kept.
    """
    from transformers import DynamicCache, StaticCache

    loaded = loaded_model(spec, packed=packed)
    if attention is not None:
        loaded.model.set_attn_implementation(attention)  # type: ignore[operator]
    model = change(loaded.model, loaded)
    config: Any = model.config
    forward: Callable[..., Any] = model
    if spec.kind == "training":
        return TrainingRunner(model, model if compiled is None else torch.compile(model, backend=compiled))
    make: Callable[[], Any] = lambda: DynamicCache(config=config)  # noqa: E731
    if cache is not None:
        chosen = cache
        make = lambda: chosen(config)  # noqa: E731
    if compiled is not None:
        forward = torch.compile(model, dynamic=False, backend=compiled)
        make = lambda: StaticCache(config=config, max_cache_len=spec.capacity)  # noqa: E731
    return TransformersRunner(model, spec, forward, make)


def optimized_runner(spec: Spec, *, scheme: str | None = None, backend: str | None = None, packed: bool = False) -> Any:
    """The model with kernels swapped in, quantized before by `scheme`, every call forced on `backend`, where given.

    packed: as of `transformers_runner`.
    """
    from llmkern import KVCache
    from llmkern.config import settings

    def change(model: nn.Module, loaded: Loaded) -> nn.Module:
        if scheme is not None:
            quantize(model, loaded, scheme)
        optimize_(model, on_unsupported="ignore")
        settings.backend = backend if backend is not None else settings.backend
        return model

    return transformers_runner(spec, change=change, cache=KVCache, packed=packed)
