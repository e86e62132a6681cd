"""The cache that a transformers model makes where the caller gives none: in `generate`, and in a decoder's forward.

It becomes an llmkern.KVCache with layers of the same kinds, on the CPU, where a step's time goes into copying the past
otherwise; in the EncoderDecoderCache of an encoder-decoder that of the decoder's own tokens, while the encoder's keys
and values, which never grow, stay in a DynamicCache.  What the caller chooses (past_key_values, cache_implementation,
use_cache=False) is left as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from llmkern.swap.derive import mentioned_globals
from llmkern.swap.edit import Edit
from llmkern.swap.match import Match

SWITCHES = ("kv_cache",)

_PREPARE = "_prepare_cache_for_generation"
_MADE, _BOTH = "DynamicCache", "EncoderDecoderCache"
_DTYPES = {"auto": None, "int8": "int8"}


def find(module: nn.Module) -> Match | None:
    cls: Any = type(module)
    generates = hasattr(cls, _PREPARE)
    if not generates and not (_MADE in mentioned_globals(cls.forward) and _looks_back(module)):
        return None
    reason = _why_not(module)
    if reason:
        return Match("cache", "", reason) if generates else None
    # With an encoder a forward makes the pair of caches, whose second one stays as it is.
    made = _BOTH if module.config.is_encoder_decoder else _MADE  # type: ignore[union-attr]
    edits = {choice: _edit(cls, made, dtype) for choice, dtype in _DTYPES.items()}
    served = {"auto": "KVCache", "int8": "KVCache int8"} if generates else {}
    return Match("cache", "", edit=edits["auto"], edits=edits, served=served)


def _looks_back(module: nn.Module) -> bool:
    """Return True if its attention is causal: encoders of the BERT family have the code of a decoder, too."""
    return any(getattr(child, "is_causal", False) is True for child in module.modules())


def _why_not(module: Any) -> str:
    from llmkern.integrations.transformers.cache import KVCache
    from llmkern.integrations.transformers.kv_layers import KVLayer

    config = module.config
    if getattr(config, "add_cross_attention", False) and not config.is_encoder_decoder:
        return "its cache may hold keys and values of an encoder too, and stays transformers' own"
    if not getattr(module, "_supports_default_dynamic_cache", lambda: True)():
        return "it has a kind of cache of its own"
    layers = KVCache(config).layers
    if layers and not any(isinstance(layer, KVLayer) for layer in layers):
        return "none of its layers keeps plain keys and values"
    return ""


@functools.cache
def _edit(cls: Any, name: str, dtype: str | None) -> Edit:
    """The edit with caches of that dtype.  name: of the class that the forward makes."""
    made = mentioned_globals(cls.forward).get(name)
    rebinds = () if made is None else ((name, _Default(made.__name__, (made,), {"_llmkern_dtype": dtype})),)
    members = ((_PREPARE, _prepare(getattr(cls, _PREPARE), dtype)),) if hasattr(cls, _PREPARE) else ()
    return Edit(rebinds=rebinds, members=members, when=_serves)


def _serves(module: Any) -> bool:
    """Autograd has to keep what each step returned, and a compiled graph its guards: both as transformers does it."""
    plain = torch.compiler.is_compiling() or torch.is_grad_enabled()
    return not plain and module.device.type == "cpu"


def _prepare(original: Callable[..., Any], dtype: str | None) -> Callable[..., Any]:
    @functools.wraps(original)
    def prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        given = model_kwargs.get("past_key_values")
        result = getattr(self._llmkern_original, _PREPARE)(self, generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get("past_key_values")
        if made is not given and generation_config.cache_implementation is None and self.device.type == "cpu":
            model_kwargs["past_key_values"] = _in_place_of(made, dtype)
        return result

    return prepare


class _Default(type):
    """A class that is called in the name of a class of caches; `isinstance` means what it did."""

    _llmkern_dtype: str | None

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _in_place_of(cls.__base__(*args, **kwargs), cls._llmkern_dtype)  # type: ignore[misc]

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.__base__)  # type: ignore[arg-type]


def _in_place_of(cache: Any, dtype: str | None) -> Any:
    """A KVCache for the new DynamicCache, or in a new EncoderDecoderCache; anything else, and one that offloads, is
    returned.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    from llmkern.integrations.transformers.cache import KVCache

    if type(cache) is EncoderDecoderCache:
        cache.self_attention_cache = _in_place_of(cache.self_attention_cache, dtype)
        return cache
    if type(cache) is not DynamicCache or cache.offloading or cache.get_seq_length():
        return cache
    return KVCache.in_place_of(cache, dtype)
