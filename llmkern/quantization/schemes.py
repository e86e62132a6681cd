"""Quantization schemes: small frozen dataclasses, with strings as shorthands; checkpoints store them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Union

from llmkern.packed import BLOCK

__all__ = ["NAMES", "ByLayer", "Int4", "Int8", "Scheme", "scheme_from_dict", "scheme_named", "scheme_to_dict"]

GROUPS = (32, 64, 128)


def _check_error(name: str, error: Any) -> None:
    if not (isinstance(error, (int, float)) and error >= 0 and not math.isnan(error)):
        raise ValueError(f"{name}: max_error is {error!r}, expected a number that is 0 or more")


@dataclass(frozen=True)
class Int8:
    """int8 weights and int8 activations, by channel and token or in blocks.

    block: None for one scale per output channel and per token; 32 for a scale per 32 neighbours on both sides, as
        llama.cpp's Q8_0 has them: nearly lossless, for a sixteenth more memory.
    max_error: by channel, a layer whose W8A8 output error (`quantize_`) is larger gets blocks, or keeps floating-point
        activations; 0 makes every layer weight-only.
    smooth: fold the loud channels of activations into the weights (SmoothQuant).
    Raises ValueError for a max_error that is negative or NaN, and for other blocks.
    """

    max_error: float = 0.025
    smooth: bool = True
    block: int | None = None

    def __post_init__(self) -> None:
        _check_error("Int8", self.max_error)
        if self.block not in (None, BLOCK):
            raise ValueError(f"Int8: block is {self.block!r}, expected None or {BLOCK}")


@dataclass(frozen=True)
class Int4:
    """int4 weights in groups with a scale each, found by a search, and int8 activations in blocks of 32.

    group: columns that share a scale, 32, 64 or 128; the largest of these that is not more and divides the columns.
    symmetric: levels −8 … 7 times the scale; else an integer zero point for each group too, which costs a byte, and
        which stock transformers does not load (5.23 expects zero points that are not packed; vLLM does).
    max_error: a layer whose output error (`quantize_`) is larger gets int8 in blocks of 32 instead.
    smooth: as of Int8.
    bits: mean of a weight's bits, scales and zero points included.  What is more than the groups take goes to the
        layers whose rounding costs a language model the most: narrower groups, or int8.  None: to none.
    Raises ValueError for other groups, a max_error that is negative or NaN, and bits that are not from 4 to 9.
    """

    group: int = 128
    symmetric: bool = True
    max_error: float = 0.2
    smooth: bool = True
    bits: float | None = 4.3

    def __post_init__(self) -> None:
        _check_error("Int4", self.max_error)
        if self.bits is not None and not (isinstance(self.bits, (int, float)) and 4 <= self.bits <= 9):
            raise ValueError(f"Int4: bits is {self.bits!r}, expected None or a number from 4 to 9")
        if self.group not in GROUPS:
            raise ValueError(f"Int4: group is {self.group!r}, expected {' or '.join(map(str, GROUPS))}")


@dataclass(frozen=True)
class ByLayer:
    """Another scheme for each layer: that of the first pattern which names it; None, or no pattern, leaves it.

    A pattern is a module name, a run of whole parts of one ("mlp.down_proj", "layers.0"), or a name with `*`.
    """

    patterns: tuple[tuple[str, Int8 | Int4 | None], ...]

    def of(self, path: str) -> Int8 | Int4 | None:
        """Return the scheme for the layer of this name."""
        for pattern, scheme in self.patterns:
            if f".{pattern}." in f".{path}." or fnmatchcase(path, pattern):
                return scheme
        return None


Scheme = Union[Int8, Int4, ByLayer]  # noqa: UP007  (isinstance takes it on Python 3.10 as well)
"""Any of them."""

_NAMED: dict[str, Int8 | Int4] = {
    "int8": Int8(),
    "int8-block": Int8(block=BLOCK),
    "int4": Int4(),
    "int4-g32": Int4(group=32),
}
NAMES = tuple(_NAMED)
"""The strings that stand for a scheme."""
_CLASSES: dict[str, type[Int8 | Int4]] = {"int8": Int8, "int4": Int4}


def scheme_named(scheme: Any, what: str = "quantize_") -> Scheme:
    """The scheme that a string, or a dict of schemes by pattern, stands for, or the scheme itself.

    Raises ValueError for another string or an empty dict, TypeError for anything else.
    """
    if isinstance(scheme, (Int8, Int4, ByLayer)):
        return scheme
    accepted = f"expected {', '.join(map(repr, NAMES))}, llmkern.Int8(…) or llmkern.Int4(…)"
    if isinstance(scheme, Mapping):
        if not scheme or not all(isinstance(pattern, str) for pattern in scheme):
            raise ValueError(f"{what}: scheme is {dict(scheme)!r}, expected schemes by name of a layer")
        return ByLayer(tuple((pattern, _of_layer(each, what)) for pattern, each in scheme.items()))
    if not isinstance(scheme, str):
        raise TypeError(f"{what}: scheme is a {type(scheme).__name__}, {accepted}, or a dict of these by layer")
    if scheme not in _NAMED:
        raise ValueError(f"{what}: scheme is {scheme!r}, {accepted}")
    return _NAMED[scheme]


def _of_layer(scheme: Any, what: str) -> Int8 | Int4 | None:
    found = None if scheme is None else scheme_named(scheme, what)
    if isinstance(found, ByLayer):
        raise TypeError(f"{what}: the scheme of a layer is a dict, expected a scheme or None")
    return found


def scheme_to_dict(scheme: Scheme) -> dict[str, Any]:
    """`{"scheme": name, …its fields}`, or `{"layers": {pattern: {…}}}`, for JSON."""
    if isinstance(scheme, ByLayer):
        return {"layers": {pattern: each and scheme_to_dict(each) for pattern, each in scheme.patterns}}
    name = next(name for name, cls in _CLASSES.items() if type(scheme) is cls)
    return {"scheme": name} | {
        field.name: value
        for field in fields(scheme)
        if (value := getattr(scheme, field.name)) is not None or field.default is not None
    }


def scheme_from_dict(written: dict[str, Any]) -> Scheme:
    """The scheme that `scheme_to_dict` wrote; fields of newer versions are not accepted.

    Raises ValueError for an unknown scheme or field.
    """
    given = dict(written)
    if "layers" in given:
        return scheme_named({pattern: each and scheme_from_dict(each) for pattern, each in given["layers"].items()})
    name = given.pop("scheme", "int8")
    if name not in _CLASSES:
        raise ValueError(f"quantization_config: scheme is {name!r}, expected {' or '.join(map(repr, _CLASSES))}")
    try:
        return _CLASSES[name](**given)
    except TypeError as error:
        raise ValueError(f"quantization_config: {error}") from None
