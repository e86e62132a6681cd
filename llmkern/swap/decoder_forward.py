"""The forward of a decoder layer that was swapped as a whole: one op where it can be, else the layer's own forward.

This runs once for each layer and token, between matrix products that have emptied the caches: it looks at what it
must, in plain dictionaries, and calls the native kernel without further ado where nobody wants to hear of the call.
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
from llmkern.dispatch import unwatched
from llmkern.integrations.transformers.attention import HARMLESS
from llmkern.swap.whole_layer import (
    ChildPart,
    LinearPart,
    NormPart,
    Unserved,
    check_arguments,
    check_children,
    eps_of,
    layer_mask,
    linear_arguments,
    norm_parameter,
    parts,
    why_parts,
)

__all__ = ["LINEARS", "OP", "DecoderParts", "forward"]

OP = "decoder_layer_"
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
_KNOWN = HARMLESS | {"attention_mask"}
_NO_BUFFERS = (None, None, None, None)

_Buffers = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class DecoderParts:
    """What a layer consists of.

    attention: its name.  norms: input_norm, post_norm, q_norm and k_norm of the op.
    linears: in the order of `LINEARS`.  classes: of all that is computed without being called.
    window: keys that a query without a mask sees, -1 for all.
    """

    attention: str
    norms: tuple[NormPart | None, ...]
    linears: tuple[LinearPart, ...]
    classes: tuple[ChildPart, ...]
    norm_offset: float
    head_dim: int
    kv_heads: int
    interleaved: bool
    activation: str
    sm_scale: float = 0.0
    window: int = -1


def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    reason = parts(self, hidden_states)
    if reason is None:
        try:
            return _whole(self, self._llmkern_layer, hidden_states, args, kwargs)
        except Unserved as unserved:
            reason = str(unserved)
    return why_parts(self, OP, reason, hidden_states, args, kwargs)


def _whole(self: Any, layer: DecoderParts, hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
    if args or not _KNOWN.issuperset(kwargs):
        check_arguments(args, kwargs, _KNOWN)
    cos, sin = kwargs.get("position_embeddings") or (None, None)
    if cos is None or cos.dtype is not hidden.dtype or cos.dim() != 3:
        raise Unserved("there are no rotary embeddings in the dtype of the hidden states")
    check_children(self, layer.classes)
    linears, scheme = linear_arguments(self, layer.linears, hidden)
    past, buffers, written = _cached(kwargs.get("past_key_values"), self, layer, hidden)
    mask = kwargs.get("attention_mask")
    if mask is not None:
        mask = layer_mask(mask, hidden, past + hidden.shape[1])
    arguments = (
        hidden,
        cos,
        sin,
        *buffers,
        past,
        mask,
        *[None if norm is None else norm_parameter(self, norm, norm.weight, hidden) for norm in layer.norms],
        *linears,
        layer.head_dim,
        eps_of(self, layer.norms),
        layer.norm_offset,
        layer.interleaved,
        layer.sm_scale,
        layer.window,
        0.0,
        layer.activation,
        scheme,
    )
    if unwatched():
        with torch._C._AutoDispatchBelowAutograd():
            out: Tensor = _OPERATOR(*arguments)
    else:
        out = ops.decoder_layer_(**dict(zip(_NAMES, arguments, strict=True)))
    written()
    return out


def _cached(cache: Any, self: Any, layer: DecoderParts, hidden: Tensor) -> tuple[int, _Buffers, Callable[[], Any]]:
    """Tokens in the cache, the op's four buffers, and what to do when the op has written them."""
    if cache is None:
        return 0, _NO_BUFFERS, _nothing
    dynamic_cache, kv_cache, kv_layer = _cache_classes()
    index = self._modules[layer.attention].layer_idx
    if type(cache) is kv_cache and index < len(cache.layers):
        held = cache.layers[index]
        if isinstance(held, kv_layer):
            return _reserved(held, layer, hidden)
    if type(cache) in (kv_cache, dynamic_cache) and not cache.get_seq_length(index):
        # Keys and values of the first tokens are made apart, and given to the cache as the attention would do.
        shape = (hidden.shape[0], layer.kv_heads, hidden.shape[1], layer.head_dim)
        k, v = hidden.new_empty(shape), hidden.new_empty(shape)
        return 0, (k, v, None, None), partial(cache.update, k, v, index)
    filled = " with tokens in it" if type(cache) is dynamic_cache else ""
    raise Unserved(f"the cache is a {type(cache).__name__}{filled}, not a llmkern.KVCache")


def _reserved(held: Any, layer: DecoderParts, hidden: Tensor) -> tuple[int, _Buffers, Callable[[], Any]]:
    """The same for a layer of a KVCache, where the op writes what it holds."""
    if not held.is_initialized:
        held.lazy_initialization(hidden.new_empty((hidden.shape[0], layer.kv_heads, 0, layer.head_dim)))
    tokens = hidden.shape[1]
    held.reserve(tokens)
    begin, buffers = held.begin, held._buffers
    k = buffers[0]
    if k.shape[0] != hidden.shape[0] or (len(buffers) == 2 and k.dtype is not hidden.dtype):
        raise Unserved("the cache holds another batch size or dtype")
    past = held.end - begin
    if begin:
        buffers = tuple([buffer[:, :, begin:] for buffer in buffers])
    return past, buffers if len(buffers) == 4 else (*buffers, None, None), partial(held.advance, tokens)


def _nothing() -> None:
    pass


@once
def _cache_classes() -> tuple[Any, Any, Any]:
    """transformers need not be there before a layer is given one of its caches."""
    from transformers.cache_utils import DynamicCache

    from llmkern.integrations.transformers.cache import KVCache
    from llmkern.integrations.transformers.kv_layers import KVLayer

    return DynamicCache, KVCache, KVLayer


_OPERATOR = torch.ops.llmkern.decoder_layer_.default
_NAMES = tuple(a.name for a in _OPERATOR._schema.arguments)
