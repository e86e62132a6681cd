"""Attributes that have another value within a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["assigned"]


@contextlib.contextmanager
def assigned(owner: Any, **values: Any) -> Iterator[None]:
    """Within the block `owner` has these attributes' values; afterwards those of before, whatever happened."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
