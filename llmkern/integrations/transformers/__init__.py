"""Integration with Hugging Face transformers; imported only once a model or a cache of it is used."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any


@functools.cache
def kv_cache() -> Any:
    """Return the class `KVCache`, or without transformers a class that raises when called."""
    if importlib.util.find_spec("transformers") is not None:
        from llmkern.integrations.transformers.cache import KVCache

        return KVCache
    return _missing("KVCache", "a cache")


@functools.cache
def quantization_config(name: str) -> Any:
    """Return the config of this name, or without transformers a class that raises when called."""
    if importlib.util.find_spec("transformers") is not None:
        from llmkern.quantization import transformers_quantizer

        return getattr(transformers_quantizer, name)
    return _missing(name, "a config")


def _missing(name: str, kind: str) -> Any:
    """Make a class of that name whose instances cannot be created."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ImportError(f"llmkern.{name} is {kind} of Hugging Face transformers, which is not installed")

    return type(name, (), {"__init__": refuse})
