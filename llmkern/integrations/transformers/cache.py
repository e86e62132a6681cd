"""`KVCache`: a transformers cache whose steps never copy the past."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from llmkern.checks import check_choice
from llmkern.integrations.transformers.kv_layers import Int8KVLayer, Int8SlidingKVLayer, KVLayer, SlidingKVLayer

__all__ = ["DTYPES", "KVCache"]

DTYPES = (None, "int8")


class KVCache(DynamicCache):
    """A DynamicCache that grows by doubling; what it holds and returns is the same.

    config: the model's; it says which layers have a sliding window, are recurrent, or share another's states.
        Without it layers are made as they are first written to, all of them for full attention.
    dtype: None holds keys and values as they come; "int8" a quarter of fp32's bytes (`Int8KVLayer` has the details).

    `cache.layers[i]` is a `KVLayer` for full attention, a `SlidingKVLayer` for a sliding or chunked window, and
    transformers' own for anything else (recurrent states, indexed or shared layers).  Device and dtype are those of a
    layer's first update.  Works wherever DynamicCache does: `generate`, beam search, assisted generation, crop,
    deepcopy, pickling; offloading is left to `cache_implementation="offloaded"`.
    Where gradients are recorded layers concatenate as DynamicCache's do, since autograd may save what they returned.
    Otherwise an update returns views of the buffers: their tokens change only when a crop has given up their slots.
    Raises ValueError for another dtype.
    """

    def __init__(self, config: Any = None, *, dtype: str | None = None) -> None:
        check_choice("KVCache", "dtype", dtype, DTYPES)
        super().__init__(config=config)
        self._grow_by_doubling(dtype)

    @classmethod
    def in_place_of(cls, cache: DynamicCache, dtype: str | None = None) -> KVCache:
        """A KVCache with layers of the same kinds as a DynamicCache that nothing has been written to yet."""
        made = cls.__new__(cls)
        vars(made).update(vars(cache))
        made._grow_by_doubling(dtype)
        return made

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more tokens in each layer of ours that has buffers: the next ones replace none."""
        for layer in self.layers:
            if isinstance(layer, KVLayer) and layer.is_initialized:
                layer.reserve(tokens)

    def _grow_by_doubling(self, dtype: str | None) -> None:
        self.layers = [_growing(layer, dtype) for layer in self.layers]
        if self.layer_class_to_replicate is not None:
            self.layer_class_to_replicate = KVLayer if dtype is None else Int8KVLayer


def _growing(layer: Any, dtype: str | None) -> Any:
    """The layer of ours for transformers' empty one; itself where there is none."""
    if type(layer) is DynamicLayer:
        return KVLayer() if dtype is None else Int8KVLayer()
    # A window of one token is none to transformers: it keeps everything.
    if type(layer) is not DynamicSlidingWindowLayer or layer.sliding_window < 2:
        return layer
    cls = SlidingKVLayer if dtype is None else Int8SlidingKVLayer
    made = cls(sliding_window=layer.sliding_window)
    made.record_past = getattr(layer, "record_past", False)
    return made
