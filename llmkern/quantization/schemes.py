"""Quantization schemes: small frozen dataclasses, with strings as shorthands; checkpoints store them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Union

from llmkern.packed import BLOCK

__all__ = [
    "NAMES",
    "ByLayer",
    "Groups",
    "Int4",
    "Int5",
    "Int6",
    "Int8",
    "LayerScheme",
    "Scheme",
    "scheme_from_dict",
    "scheme_named",
    "scheme_to_dict",
]

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
class Groups:
    """Base of schemes with a scale, found by a search, for each group of a weight's columns; see `Int4`."""

    code_bits: ClassVar[int]
    symmetric: ClassVar[bool] = True

    group: int = 128
    max_error: float = 0.2
    smooth: bool = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        _check_error(name, self.max_error)
        if self.group not in GROUPS:
            raise ValueError(f"{name}: group is {self.group!r}, expected {' or '.join(map(str, GROUPS))}")


@dataclass(frozen=True)
class Int4(Groups):
    """int4 weights in groups with a scale each, found by a search, and int8 activations in blocks of 32.

    group: columns that share a scale, 32, 64 or 128; the largest of these that is not more and divides the columns.
    max_error: a layer whose output error (`quantize_`) is larger gets int8 in blocks of 32 instead.
    smooth: as of Int8.
    symmetric: levels −8 … 7 times the scale; else an integer zero point for each group too, which costs a byte, and
        which stock transformers does not load (5.23 expects zero points that are not packed; vLLM does).
    bits: mean of a weight's bits, scales and zero points included, output heads and embeddings not.  What is more than
        the groups take goes to the layers whose rounding costs a language model the most: narrower groups, or 5, 6 or
        8 bits.  None: to none, as vLLM wants it, whose layers are several of transformers' in one.
    Raises ValueError for other groups, a max_error that is negative or NaN, and bits that are not from 4 to 9.
    """

    code_bits: ClassVar[int] = 4

    symmetric: bool = True  # type: ignore[misc]  # of the others it is no field
    bits: float | None = 4.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is not None and not (isinstance(self.bits, (int, float)) and 4 <= self.bits <= 9):
            raise ValueError(f"Int4: bits is {self.bits!r}, expected None or a number from 4 to 9")


@dataclass(frozen=True)
class Int5(Groups):
    """As `Int4` with symmetric levels −16 … 15, the same in all layers."""

    code_bits: ClassVar[int] = 5


@dataclass(frozen=True)
class Int6(Groups):
    """As `Int4` with symmetric levels −32 … 31, the same in all layers."""

    code_bits: ClassVar[int] = 6


LayerScheme = Union[Int8, Groups]  # noqa: UP007  (isinstance takes it on Python 3.10 as well)
"""A scheme that one layer can have."""


@dataclass(frozen=True)
class ByLayer:
    """Another scheme for each layer: that of the first pattern which names it; None, or no pattern, leaves it.

    A pattern is a module name, a run of whole parts of one ("mlp.down_proj", "layers.0"), or a name with `*`.
    """

    patterns: tuple[tuple[str, LayerScheme | None], ...]

    def of(self, path: str) -> LayerScheme | None:
        """Return the scheme for the layer of this name."""
        for pattern, scheme in self.patterns:
            if f".{pattern}." in f".{path}." or fnmatchcase(path, pattern):
                return scheme
        return None


Scheme = Union[LayerScheme, ByLayer]  # noqa: UP007
"""Any of them."""

_NAMED: dict[str, LayerScheme] = {
    "int8": Int8(),
    "int8-block": Int8(block=BLOCK),
    "int4": Int4(),
    "int4-g32": Int4(group=32, bits=None),
    "int5": Int5(),
    "int6": Int6(),
}
NAMES = tuple(_NAMED)
"""The strings that stand for a scheme."""
_CLASSES: dict[str, type[LayerScheme]] = {"int8": Int8, "int4": Int4, "int5": Int5, "int6": Int6}


def scheme_named(scheme: Any, what: str = "quantize_") -> Scheme:
    """The scheme that a string, or a dict of schemes by pattern, stands for, or the scheme itself.

    Raises ValueError for another string or an empty dict, TypeError for anything else.
    """
    if isinstance(scheme, (Int8, Groups, ByLayer)):
        return scheme
    accepted = f"expected {', '.join(map(repr, NAMES))}, llmkern.Int8(…), Int4(…), Int5(…) or Int6(…)"
    if isinstance(scheme, Mapping):
        if not scheme or not all(isinstance(pattern, str) for pattern in scheme):
            raise ValueError(f"{what}: scheme is {dict(scheme)!r}, expected schemes by name of a layer")
        return ByLayer(tuple((pattern, _of_layer(each, what)) for pattern, each in scheme.items()))
    if not isinstance(scheme, str):
        raise TypeError(f"{what}: scheme is a {type(scheme).__name__}, {accepted}, or a dict of these by layer")
    if scheme not in _NAMED:
        raise ValueError(f"{what}: scheme is {scheme!r}, {accepted}")
    return _NAMED[scheme]


def _of_layer(scheme: Any, what: str) -> LayerScheme | None:
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
