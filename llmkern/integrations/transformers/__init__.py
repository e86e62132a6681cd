"""What llmkern knows of Hugging Face transformers; imported only where a model or a cache of it is at hand."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any


@functools.cache
def kv_cache() -> Any:
    """The class `KVCache`; without transformers, one that says so when it is called."""
    if importlib.util.find_spec("transformers") is not None:
        from llmkern.integrations.transformers.cache import KVCache

        return KVCache
    return _Missing


class _Missing:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError("llmkern.KVCache is a cache of Hugging Face transformers, which is not installed")
