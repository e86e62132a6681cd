"""The forward of a decoder layer that was swapped as a whole: one op where it can be, else the layer's own forward.

This runs once for each layer and token, between matrix products that have emptied the caches: it looks at what it
must, in plain dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as once
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmkern import ops
from llmkern.integrations.transformers.attention import HARMLESS
from llmkern.swap.derive import is_own
from llmkern.swap.surroundings import Surroundings
from llmkern.swap.whole_layer import (
    LinearPart,
    NormPart,
    NotServed,
    check_arguments,
    check_guard,
    computed,
    eps_of,
    layer_mask,
    linear_arguments,
    norm_parameter,
    run_parts,
    scheme_argument,
    why_not_fused,
)

__all__ = [
    "LINEARS",
    "OP",
    "DecoderParts",
    "cache_classes",
    "check_call",
    "check_updates",
    "forward",
    "layer_parameters",
    "numbers",
    "reserved",
]

OP = "decoder_layer_"
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
_KNOWN = HARMLESS | {"attention_mask"}

_Buffers = tuple[Tensor, ...]


@dataclass(frozen=True)
class DecoderParts:
    """What a layer consists of.

    attention: its name.  norms: input_norm, post_norm, q_norm and k_norm of the op.
    linears: in the order of `LINEARS`.
    window: keys that a query without a mask sees, -1 for all.
    """

    attention: str
    norms: tuple[NormPart | None, ...]
    linears: tuple[LinearPart, ...]
    norm_offset: float
    head_dim: int
    kv_heads: int
    interleaved: bool
    activation: str
    sm_scale: float = 0.0
    window: int = -1


def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    reason = why_not_fused(self, hidden_states)
    if reason is None:
        try:
            return _whole(self, self._llmkern_layer, hidden_states, args, kwargs)
        except NotServed as unserved:
            reason = str(unserved)
    return run_parts(self, OP, reason, hidden_states, args, kwargs)


def _whole(self: Any, layer: DecoderParts, hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
    cos, sin = check_call(hidden, args, kwargs)
    check_guard(self)
    parameters, schemes, eps = layer_parameters(self, layer, hidden)
    past, buffers, written = _cached(kwargs.get("past_key_values"), self, layer, hidden)
    mask = kwargs.get("attention_mask")
    arguments = (
        hidden,
        cos,
        sin,
        *buffers,
        *([None] * (4 - len(buffers))),
        past,
        None if mask is None else layer_mask(mask, hidden, past + hidden.shape[1]),
        *parameters,
        *numbers(layer, eps),
        scheme_argument(schemes, hidden),
    )
    out = computed(ops.decoder_layer_, _OPERATOR, arguments)
    written()
    return out


def check_call(hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """cos and sin; `NotServed` where they are not the op's, or the call says more than it can be told."""
    if args or not _KNOWN.issuperset(kwargs):
        check_arguments(args, kwargs, _KNOWN)
    angles = kwargs.get("position_embeddings")
    if type(angles) is not tuple or len(angles) != 2 or angles[0].dtype is not hidden.dtype or angles[0].dim() != 3:
        raise NotServed("there are no rotary embeddings in the dtype of the hidden states")
    return angles


def layer_parameters(
    self: Any, layer: DecoderParts, hidden: Tensor
) -> tuple[list[Tensor | None], tuple[str | None, ...], float]:
    """The op's arguments from input_norm to down_bias, the schemes of the linear layers, and eps."""
    linears, schemes = linear_arguments(self, layer.linears, hidden)
    norms = [None if norm is None else norm_parameter(self, norm, norm.weight, hidden) for norm in layer.norms]
    return [*norms, *linears], schemes, eps_of(self, layer.norms)


def numbers(layer: DecoderParts, eps: float) -> tuple[Any, ...]:
    """The op's arguments from head_dim to activation."""
    return (
        layer.head_dim,
        eps,
        layer.norm_offset,
        layer.interleaved,
        layer.sm_scale,
        layer.window,
        0.0,
        layer.activation,
    )


def _cached(cache: Any, self: Any, layer: DecoderParts, hidden: Tensor) -> tuple[int, _Buffers, Callable[[], Any]]:
    """Tokens in the cache, the op's buffers, and what to do when the op has written them."""
    if cache is None:
        return 0, (), _nothing
    check_updates(cache)
    dynamic_cache, kv_cache, kv_layers = cache_classes()
    index = self._modules[layer.attention].layer_idx
    if type(cache) is kv_cache and index < len(cache.layers):
        held = cache.layers[index]
        if type(held) in kv_layers:
            return reserved(held, layer, hidden)
    if type(cache) in (kv_cache, dynamic_cache) and not cache.get_seq_length(index):
        # Keys and values of the first tokens are made apart, and given to the cache as the attention would do.
        shape = (hidden.shape[0], layer.kv_heads, hidden.shape[1], layer.head_dim)
        k, v = hidden.new_empty(shape), hidden.new_empty(shape)
        return 0, (k, v), partial(cache.update, k, v, index)
    filled = " with tokens in it" if type(cache) is dynamic_cache else ""
    raise NotServed(f"the cache is a {type(cache).__name__}{filled}, not a llmkern.KVCache")


def reserved(held: Any, layer: DecoderParts, hidden: Tensor) -> tuple[int, _Buffers, Callable[[], Any]]:
    """The same for a layer of a KVCache, where the op writes what it holds."""
    if not held.is_initialized:
        held.lazy_initialization(hidden.new_empty((hidden.shape[0], layer.kv_heads, 0, layer.head_dim)))
    tokens = hidden.shape[1]
    held.reserve(tokens)
    begin, buffers = held.begin, held._buffers
    k = buffers[0]
    if k.shape[0] != hidden.shape[0] or (len(buffers) == 2 and k.dtype is not hidden.dtype):
        raise NotServed("the cache holds another batch size or dtype")
    past = held.end - begin
    if begin:
        buffers = tuple([buffer[:, :, begin:] for buffer in buffers])
    return past, buffers, partial(held.advance, tokens)


def _nothing() -> None:
    pass


def check_updates(cache: Any) -> None:
    """Raises `NotServed` where the cache's `update`, which is not called, or that of its layers is another one."""
    if any(["update" in vars(held) for held in (cache, *getattr(cache, "layers", ()))]):
        raise NotServed("the cache, or a layer of it, has an update of its own")
    updates, own = _updates()
    reason = updates.why()
    if reason is not None or not own:
        raise NotServed(reason or "the update of a class of caches was replaced")


@once
def cache_classes() -> tuple[Any, Any, tuple[Any, ...]]:
    """DynamicCache, KVCache and its layers; transformers need not be there before a layer is given a cache of its."""
    from transformers.cache_utils import DynamicCache

    from llmkern.integrations.transformers import kv_layers
    from llmkern.integrations.transformers.cache import KVCache

    layers = (kv_layers.KVLayer, kv_layers.SlidingKVLayer, kv_layers.Int8KVLayer, kv_layers.Int8SlidingKVLayer)
    return DynamicCache, KVCache, layers


@once
def _updates() -> tuple[Surroundings, bool]:
    """Where the caches' methods `update` lie, and whether they are their classes' own."""
    dynamic, ours, layers = cache_classes()
    bases = dict.fromkeys(base for cls in (dynamic, ours, *layers) for base in cls.__mro__[:-1])
    own = all(is_own(base, "update") for base in bases if "update" in vars(base))
    return Surroundings((), [(vars(base), "update", f"{base.__name__}.update") for base in bases]), own


_OPERATOR = torch.ops.llmkern.decoder_layer_.default
