"""Locate the buffers where `layers_` reads and writes a layer's keys and values, and the work left after the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache as once
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from llmkern.swap.derive import is_own
from llmkern.swap.surroundings import Surroundings
from llmkern.swap.whole_layer import NotServed, WholeLayer

__all__ = ["Cached", "cached_by_all", "cached_by_one"]

_Buffers = tuple[Tensor, ...]
_Write = Callable[[], Any]
_Part = tuple[int, _Buffers, _Write]  # tokens, their buffers, and what is left to do once the op has written them


class Cached(NamedTuple):
    """Cache tensors that a call of `layers_` reads and writes.

    past: tokens in the caches.  buffers: as the op takes them.  kept: an encoder's tokens whose keys and values are
    there; 0 where the op makes them.  written: to be called after the op.
    """

    past: int
    buffers: list[Tensor]
    kept: int
    written: _Write


def cached_by_one(cache: Any, index: int, whole: WholeLayer, hidden: Tensor, encoder: Tensor | None) -> Cached:
    """Return the caches of the layer at that index.  encoder: the hidden states that it attends to besides."""
    if cache is None:
        return Cached(0, [], 0, _nothing)
    own, both = _apart(cache, whole.keeps)
    past, buffers, written = _of_own_tokens(own, index, whole, hidden)
    kept, more, updated = _of_encoder(both, index, whole, hidden, encoder) if whole.keeps else (0, (), _nothing)
    return Cached(past, [*buffers, *more], kept, partial(_each, [written, updated]))


def cached_by_all(cache: Any, first: int, wholes: list[WholeLayer], hidden: Tensor, encoder: Tensor | None) -> Cached:
    """Like `cached_by_one`, for the layers of a decoder starting at the first one's index."""
    if cache is None:
        return Cached(0, [], 0, _nothing)
    own, both = _apart(cache, any([whole.keeps for whole in wholes]))
    classes = _classes()
    layers = own.layers[first : first + len(wholes)] if type(own) is classes.ours else ()
    if len(layers) != len(wholes) or not all([type(each) in classes.layers for each in layers]):
        raise NotServed(f"the cache is a {type(own).__name__}, not a llmkern.KVCache with a layer for each")
    buffers: list[Tensor] = []
    written: list[_Write] = []
    forms, kept = set(), set()
    for i, (each, whole) in enumerate(zip(layers, wholes, strict=True), first):
        past, held, advance = _reserved(each, whole, hidden)
        buffers += held
        written.append(advance)
        forms.add((past, len(held)))
        if whole.keeps:
            tokens, held, update = _of_encoder(both, i, whole, hidden, encoder)
            buffers += held
            written.append(update)
            kept.add(tokens)
    if len(forms) > 1 or len(kept) > 1:
        raise NotServed("the cache's layers hold different numbers of tokens, or some of them codes")
    return Cached(past, buffers, max(kept, default=0), partial(_each, written))


def _apart(cache: Any, keeps: bool) -> tuple[Any, Any]:
    """Return the cache of a decoder's own tokens, and the whole if that keeps an encoder's too."""
    own, both = cache, None
    if keeps:
        classes = _classes()
        if type(cache) is not classes.both:
            raise NotServed(f"the cache is a {type(cache).__name__}, without a place for an encoder's keys and values")
        own, both, cross = cache.self_attention_cache, cache, cache.cross_attention_cache
        if type(cross) not in (classes.dynamic, classes.ours):
            raise NotServed(f"an encoder's keys and values are in a {type(cross).__name__}, not in a DynamicCache")
        _check_updates(cross)
    _check_updates(own)
    return own, both


def _of_own_tokens(cache: Any, index: int, whole: WholeLayer, hidden: Tensor) -> _Part:
    classes = _classes()
    if type(cache) is classes.ours and index < len(cache.layers):
        held = cache.layers[index]
        if type(held) in classes.layers:
            return _reserved(held, whole, hidden)
    if type(cache) in (classes.ours, classes.dynamic) and not cache.get_seq_length(index):
        # Keys and values of the first tokens are made apart, and given to the cache as the attention would do.
        k, v = _new(whole.cached, hidden, hidden.shape[1])
        return 0, (k, v), partial(cache.update, k, v, index)
    filled = " with tokens in it" if type(cache) is classes.dynamic else ""
    raise NotServed(f"the cache is a {type(cache).__name__}{filled}, not a llmkern.KVCache")


def _of_encoder(both: Any, index: int, whole: WholeLayer, hidden: Tensor, encoder: Tensor | None) -> _Part:
    """Return the tokens of an encoder whose keys and values the layer's cache has, or buffers for them and 0."""
    if not both.is_updated.get(index):
        assert encoder is not None
        k, v = _new(whole.kept, hidden, encoder.shape[1])
        return 0, (k, v), partial(_keep, both, k, v, index)
    held = both.cross_attention_cache.layers[index]
    k, v = held.keys, held.values
    for kept in (k, v):
        if kept.dim() != 4 or kept.shape[0] != hidden.shape[0] or kept.dtype is not hidden.dtype:
            raise NotServed("the encoder's keys and values in the cache have another batch size or dtype")
        if kept.stride(-1) != 1 or kept.device != hidden.device:
            raise NotServed("the encoder's keys and values in the cache are not contiguous, or on another device")
    return k.shape[2], (k, v), _nothing


def _keep(both: Any, k: Tensor, v: Tensor, index: int) -> None:
    """Do what the attention does with an encoder's keys and values."""
    both.cross_attention_cache.update(k, v, index)
    both.is_updated[index] = True


def _new(sizes: tuple[int, int, int], hidden: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return memory for keys and values.  sizes: heads, columns of a head of keys, and of values."""
    heads, k, v = sizes
    return hidden.new_empty((hidden.shape[0], heads, tokens, k)), hidden.new_empty((hidden.shape[0], heads, tokens, v))


def _reserved(held: Any, whole: WholeLayer, hidden: Tensor) -> _Part:
    """Like `_of_own_tokens`, for a layer of a KVCache: the op writes directly into its storage."""
    if not held.is_initialized:
        held.lazy_initialization(*_new(whole.cached, hidden, 0))
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


def _each(written: Sequence[_Write]) -> None:
    for advance in written:
        advance()


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


class _Classes(NamedTuple):
    """Caches: transformers' growing one, its pair of caches, KVCache, and the layers of that."""

    dynamic: Any
    both: Any
    ours: Any
    layers: tuple[Any, ...]


@once
def _classes() -> _Classes:
    """Return the classes of caches; imports transformers only once a layer is given one."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    from llmkern.integrations.transformers import kv_layers
    from llmkern.integrations.transformers.cache import KVCache

    layers = (kv_layers.KVLayer, kv_layers.SlidingKVLayer, kv_layers.Int8KVLayer, kv_layers.Int8SlidingKVLayer)
    return _Classes(DynamicCache, EncoderDecoderCache, KVCache, layers)


@once
def _updates() -> tuple[Surroundings, bool]:
    """Return where the caches' `update` methods are stored, and whether they are the classes' own."""
    classes = _classes()
    bases = dict.fromkeys(base for cls in (classes.dynamic, classes.ours, *classes.layers) for base in cls.__mro__[:-1])
    own = all(is_own(base, "update") for base in bases if "update" in vars(base))
    return Surroundings((), [(vars(base), "update", f"{base.__name__}.update") for base in bases]), own
