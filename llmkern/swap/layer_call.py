"""Build the arguments a layer is called with while its program is read, from the names of its forward's parameters."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmkern.swap.derive import as_before
from llmkern.swap.parts import attentions
from llmkern.swap.record import Recorder
from llmkern.swap.recorded_caches import Caches
from llmkern.swap.stand_ins import StandIns
from llmkern.swap.whole_layer import ALIASES

__all__ = [
    "INPUTS",
    "KEPT_NAMES",
    "LayerCall",
    "NoProgram",
    "Probe",
    "bias_dims_of",
    "hidden_size",
    "table_widths",
]

_ENCODER_LENGTH = 4  # other than every probe's, so that keys of an encoder are told from the layer's own
KEPT_NAMES = ("kept_keys", "kept_values")
INPUTS = ("hidden", "cos", "sin", "mask", "bias", "alibi", "encoder", "encoder_mask", *KEPT_NAMES)


class NoProgram(Exception):
    """The layer has no program; the message is the reason."""


@dataclass(frozen=True)
class Probe:
    """One run of a copy.

    how: a phrase for the sentence.  spread: of the values.  past: tokens in the cache, None for no cache.
    first: position of the first token.  masked: whether a mask is given.  kept: heads and columns of a
    head of an encoder's keys and values that the cache has already.
    biased: whether it is given a bias of the scores.
    tables: dtype of cosines and sines, where it is not that of the rows.
    """

    how: str
    dtype: torch.dtype
    batch: int
    length: int
    past: int | None = None
    first: int = 0
    spread: float = 1.0
    masked: bool = True
    kept: tuple[int, int] | None = None
    biased: bool = True
    tables: torch.dtype | None = None


class LayerCall:
    """Arguments of a layer's call, by the names of its forward's parameters."""

    def __init__(
        self, module: nn.Module, recorder: Recorder, weights: StandIns, probe: Probe, width: int | None, bias_dims: int
    ) -> None:
        self.module, self.recorder, self.weights, self.probe = module, recorder, weights, probe
        self.bias_dims = bias_dims
        self.inputs: dict[str, Tensor | None] = {}
        self.cache: Caches | None = None
        _, *others = _parameters(module)
        self.names = {ALIASES.get(parameter.name, parameter.name) for parameter in others}
        self.past = probe.past if "past_key_values" in self.names else None
        self.hidden = self.given("hidden", weights.randn(probe.batch, probe.length, hidden_size(module)), "rows")
        self.arguments: dict[str, Any] = {}
        for parameter in others:
            known = getattr(self, f"_{ALIASES.get(parameter.name, parameter.name)}", None)
            if known is not None:
                value = known(width)
                if value is not None or parameter.default is inspect.Parameter.empty:
                    self.arguments[parameter.name] = value
            elif parameter.default is inspect.Parameter.empty and parameter.kind in _NAMED:
                raise NoProgram(f"its forward asks for {parameter.name}, of which nothing is known")
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD and "position_ids" not in self.names:
                self.arguments["position_ids"] = self._position_ids(width)

    def given(self, name: str, tensor: Tensor, kind: str) -> Tensor:
        self.inputs[name] = tensor
        self.recorder.given(name, tensor, kind)
        return tensor

    @property
    def keys(self) -> int:
        return self.probe.length + (self.past or 0)

    @property
    def zeros_shape(self) -> tuple[int, int, int, int]:
        """Shape of a bias of the scores of an encoder's tokens that is zero."""
        return 1, _head_count(self.module) or 1, self.probe.length, _ENCODER_LENGTH

    def _attention_mask(self, width: int | None) -> Tensor | None:
        if not self.probe.masked:
            return None
        seen = torch.full((self.probe.length, self.keys), -math.inf, dtype=self.probe.dtype)
        mask = seen.triu((self.past or 0) + 1).expand(self.probe.batch, 1, -1, -1).clone()
        return self.given("mask", mask, "mask")

    def _position_ids(self, width: int | None) -> Tensor:
        tables = [value.shape[0] for value in self.recorder.values.all if value.kind == "lookup"]
        first = min(self.probe.first, *[rows - self.probe.length for rows in tables]) if tables else self.probe.first
        positions = torch.arange(self.probe.length)[None] + first
        return self.given("positions", positions, "positions")

    def _position_embeddings(self, width: int | None) -> tuple[Tensor, Tensor] | None:
        if width is None:
            return None
        shape = 1, self.probe.length, width
        cos, sin = [self.weights.randn(*shape).to(self.probe.tables or self.probe.dtype) for _ in range(2)]
        return self.given("cos", cos, "table"), self.given("sin", sin, "table")

    def _past_key_values(self, width: int | None) -> Any:
        if self.past is None:
            return None
        self.cache = Caches(self.recorder, self.past)
        if not self._attends_to_an_encoder():
            return self.cache.own
        kept = None
        if self.probe.kept is not None:
            heads, dim = self.probe.kept
            drawn = [self.weights.randn(self.probe.batch, heads, _ENCODER_LENGTH, dim) for _ in KEPT_NAMES]
            self.inputs.update(zip(KEPT_NAMES, drawn, strict=True))
            for name, tensor in zip(KEPT_NAMES, drawn, strict=True):
                self.recorder.given_heads(name, tensor)
            kept = drawn[0], drawn[1]
        return self.cache.for_both(kept)

    def _src_key_padding_mask(self, width: int | None) -> Tensor | None:
        if not self.probe.masked:
            return None
        mask = self.given("mask", self.weights.randn(self.probe.batch, 1, 1, self.probe.length), "mask")
        return self.recorder.moved(mask, lambda t: t[:, 0, 0])

    def _memory_key_padding_mask(self, width: int | None) -> Tensor | None:
        if not self.probe.masked:
            return None
        mask = self.given("encoder_mask", self.weights.randn(self.probe.batch, 1, 1, _ENCODER_LENGTH), "mask")
        return self.recorder.moved(mask, lambda t: t[:, 0, 0])

    def _memory(self, width: int | None) -> Tensor:
        states = self.weights.randn(self.probe.batch, _ENCODER_LENGTH, hidden_size(self.module))
        return self.given("encoder", states, "rows")

    def _use_cache(self, width: int | None) -> bool:
        return self.past is not None

    def _attends_to_an_encoder(self) -> bool:
        return "encoder_hidden_states" in self.names and len(list(attentions(self.module))) > 1

    def _encoder_hidden_states(self, width: int | None) -> Tensor | None:
        if not self._attends_to_an_encoder():
            return None
        states = self.weights.randn(self.probe.batch, _ENCODER_LENGTH, hidden_size(self.module))
        return self.given("encoder", states, "rows")

    def _encoder_attention_mask(self, width: int | None) -> Tensor | None:
        if not self._attends_to_an_encoder() or not self.probe.masked:
            return None
        mask = self.weights.randn(self.probe.batch, 1, self.probe.length, _ENCODER_LENGTH)
        return self.given("encoder_mask", mask, "mask")

    def _alibi(self, width: int | None) -> Tensor | None:
        heads = _head_count(self.module)
        if heads is None or any(getattr(config, "alibi", True) is False for config in _configs(self.module)):
            return None
        return self.given("alibi", self.weights.randn(self.probe.batch * heads, 1, self.keys), "bias")

    def _encoder_decoder_position_bias(self, width: int | None) -> Tensor | None:
        """T5's bias of the scores of an encoder's tokens is zero; the first layer is given none."""
        if not self.probe.masked:
            return None
        zeros = torch.zeros(self.zeros_shape, dtype=self.probe.dtype)
        self.recorder.values.hold(zeros, self.recorder.values.new(zeros.shape, "zeros"))
        return zeros

    def _position_bias(self, width: int | None) -> Tensor | None:
        heads = _head_count(self.module)
        if heads is None or not self.probe.biased:
            return None
        shape = (1, heads, self.probe.length, self.keys)
        return self.given(
            "bias", self.weights.randn(*(shape if self.bias_dims == 4 else (heads, 1, self.keys))), "bias"
        )


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(type(module).forward).parameters.values())[1:]


def _configs(module: nn.Module) -> Iterator[Any]:
    for child in module.modules():
        if "config" in vars(child):
            yield vars(child)["config"]


def hidden_size(module: nn.Module) -> int:
    """Return the width of the hidden states, taken from the first norm or linear layer inside."""
    for child in module.modules():
        child = as_before(child)
        columns = getattr(child, "in_features", None) or getattr(child, "nx", None)
        if isinstance(columns, int):
            return columns
        weight = child._parameters.get("weight")
        if weight is not None and weight.dim() == 1:
            return weight.numel()
    raise NoProgram("there are no linear layers in it")


def _head_count(module: nn.Module) -> int | None:
    for config in _configs(module):
        for name in ("num_attention_heads", "n_head", "n_heads", "num_heads"):
            if isinstance(count := getattr(config, name, None), int):
                return count
    for child in module.modules():
        for name in ("num_heads", "n_heads", "num_attention_heads"):
            if isinstance(count := getattr(child, name, None), int):
                return count
    return None


def table_widths(module: nn.Module) -> list[int | None]:
    """Return widths of cosines and sines to try, likely ones first; [None] if the layer takes none."""
    names = {parameter.name for parameter in _parameters(module)}
    if "position_embeddings" not in names:
        return [None]
    found: dict[int | None, None] = {}
    for child in attentions(module):
        dim = getattr(child, "head_dim", None) or getattr(child, "head_size", None)
        if not isinstance(dim, int):
            continue
        config = getattr(child, "config", None)
        scaling = getattr(config, "rope_parameters", None) or {}
        part = scaling.get("partial_rotary_factor") if isinstance(scaling, dict) else None
        part = part or getattr(config, "partial_rotary_factor", None) or getattr(config, "rotary_pct", None)
        for attribute in ("rotary_ndims", "rotary_dim", "qk_rope_head_dim"):
            if isinstance(width := getattr(child, attribute, None), int):
                found[width] = None
        if isinstance(part, float) and 0 < part < 1:
            found[int(dim * part)] = None
        found |= {dim: None, dim // 2: None}
    if not found and (heads := _head_count(module)):
        dim = hidden_size(module) // heads
        found |= {dim: None, dim // 2: None}
    return list(found) or [None]


def bias_dims_of(module: nn.Module) -> list[int]:
    """Return the numbers of dimensions to try for a bias that is added to the scores."""
    return [4, 3] if "position_bias" in {parameter.name for parameter in _parameters(module)} else [4]
