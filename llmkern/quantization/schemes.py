"""What `quantize_` is asked for: small frozen dataclasses, which strings abbreviate and checkpoints carry."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Int8", "Scheme", "scheme_from_dict", "scheme_named", "scheme_to_dict"]


@dataclass(frozen=True)
class Int8:
    """int8 weights, one scale per output channel, and int8 activations, one scale per token, where the error allows.

    max_error: a layer whose W8A8 output error (`quantize_`) is larger keeps floating-point activations; 0 makes every
        layer weight-only.
    smooth: fold the loud channels of activations into the weights (SmoothQuant).
    Raises ValueError for a max_error that is negative or NaN.
    """

    max_error: float = 0.025
    smooth: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.max_error, (int, float)) and self.max_error >= 0 and not math.isnan(self.max_error)):
            raise ValueError(f"Int8: max_error is {self.max_error!r}, expected a number that is 0 or more")


Scheme = Int8
"""Any of them."""

_NAMED: dict[str, type[Scheme]] = {"int8": Int8}


def scheme_named(scheme: Any, what: str = "quantize_") -> Scheme:
    """The scheme that a string abbreviates, or the scheme itself.

    Raises ValueError for another string, TypeError for anything else.
    """
    if isinstance(scheme, Scheme):
        return scheme
    accepted = f"expected llmkern.Int8(…) or {' or '.join(map(repr, _NAMED))}"
    if not isinstance(scheme, str):
        raise TypeError(f"{what}: scheme is a {type(scheme).__name__}, {accepted}")
    if scheme not in _NAMED:
        raise ValueError(f"{what}: scheme is {scheme!r}, {accepted}")
    return _NAMED[scheme]()


def scheme_to_dict(scheme: Scheme) -> dict[str, Any]:
    """`{"scheme": name, …its fields}`, for JSON."""
    name = next(name for name, cls in _NAMED.items() if type(scheme) is cls)
    return {"scheme": name, **asdict(scheme)}


def scheme_from_dict(fields: dict[str, Any]) -> Scheme:
    """The scheme that `scheme_to_dict` wrote; fields of newer versions are not accepted.

    Raises ValueError for an unknown scheme or field.
    """
    fields = dict(fields)
    scheme = scheme_named(fields.pop("scheme", "int8"), "quantization_config")
    try:
        return type(scheme)(**fields)
    except TypeError as error:
        raise ValueError(f"quantization_config: {error}") from None
