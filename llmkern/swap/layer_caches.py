"""Locate the buffers where `layers_` reads and writes a layer's keys and values, and the work left after the call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as once
from functools import partial
from typing import Any

from torch import Tensor

from llmkern.swap.derive import is_own
from llmkern.swap.surroundings import Surroundings
from llmkern.swap.whole_layer import NotServed, WholeLayer

__all__ = ["cached_by_all", "cached_by_one"]

_Buffers = tuple[Tensor, ...]
_Cached = tuple[int, _Buffers, Callable[[], Any]]


def cached_by_one(cache: Any, index: int, whole: WholeLayer, hidden: Tensor) -> _Cached:
    """Return the tokens in the cache, the buffers of the layer at that index, and a function to call once the op has
    written them.
    """
    if cache is None:
        return 0, (), _nothing
    _check_updates(cache)
    dynamic_cache, kv_cache, kv_layers = _classes()
    if type(cache) is kv_cache and index < len(cache.layers):
        held = cache.layers[index]
        if type(held) in kv_layers:
            return _reserved(held, whole, hidden)
    if type(cache) in (kv_cache, dynamic_cache) and not cache.get_seq_length(index):
        # Keys and values of the first tokens are made apart, and given to the cache as the attention would do.
        heads, *columns = whole.cached
        k, v = [hidden.new_empty((hidden.shape[0], heads, hidden.shape[1], each)) for each in columns]
        return 0, (k, v), partial(cache.update, k, v, index)
    filled = " with tokens in it" if type(cache) is dynamic_cache else ""
    raise NotServed(f"the cache is a {type(cache).__name__}{filled}, not a llmkern.KVCache")


def cached_by_all(
    cache: Any, first: int, wholes: list[WholeLayer], hidden: Tensor
) -> tuple[int, list[Tensor], list[Callable[[], Any]]]:
    """Like `cached_by_one`, for the layers of a decoder starting at the first one's index."""
    if cache is None:
        return 0, [], []
    _, kv_cache, kv_layers = _classes()
    held = cache.layers[first : first + len(wholes)] if type(cache) is kv_cache else ()
    if len(held) != len(wholes) or not all([type(each) in kv_layers for each in held]):
        raise NotServed("the cache is not a llmkern.KVCache with a layer for each")
    _check_updates(cache)
    buffers: list[Tensor] = []
    written = []
    forms = set()
    for each, whole in zip(held, wholes, strict=True):
        past, own, advance = _reserved(each, whole, hidden)
        buffers += own
        written.append(advance)
        forms.add((past, len(own)))
    if len(forms) > 1:
        raise NotServed("the cache's layers hold different numbers of tokens, or some of them codes")
    return past, buffers, written


def _reserved(held: Any, whole: WholeLayer, hidden: Tensor) -> _Cached:
    """Like `cached_by_one`, for a layer of a KVCache: the op writes directly into its storage."""
    if not held.is_initialized:
        heads, *columns = whole.cached
        held.lazy_initialization(*[hidden.new_empty((hidden.shape[0], heads, 0, each)) for each in columns])
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


def _check_updates(cache: Any) -> None:
    """Raise `NotServed` if `update` of the cache or of its layers, which would be bypassed, has been overridden."""
    if any(["update" in vars(held) for held in (cache, *getattr(cache, "layers", ()))]):
        raise NotServed("the cache, or a layer of it, has an update of its own")
    updates, own = _updates()
    reason = updates.why()
    if reason is not None or not own:
        raise NotServed(reason or "the update of a class of caches was replaced")


@once
def _classes() -> tuple[Any, Any, tuple[Any, ...]]:
    """Return DynamicCache, KVCache and its layer classes; imports transformers only once a layer is given one of its
    caches.
    """
    from transformers.cache_utils import DynamicCache

    from llmkern.integrations.transformers import kv_layers
    from llmkern.integrations.transformers.cache import KVCache

    layers = (kv_layers.KVLayer, kv_layers.SlidingKVLayer, kv_layers.Int8KVLayer, kv_layers.Int8SlidingKVLayer)
    return DynamicCache, KVCache, layers


@once
def _updates() -> tuple[Surroundings, bool]:
    """Return where the caches' `update` methods are stored, and whether they are the classes' own."""
    dynamic, ours, layers = _classes()
    bases = dict.fromkeys(base for cls in (dynamic, ours, *layers) for base in cls.__mro__[:-1])
    own = all(is_own(base, "update") for base in bases if "update" in vars(base))
    return Surroundings((), [(vars(base), "update", f"{base.__name__}.update") for base in bases]), own
