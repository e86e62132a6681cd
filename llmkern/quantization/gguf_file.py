"""Read GGUF files without trusting them: nothing is executed, and every size is checked before it is used.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkern.packed import PackedWeight
from llmkern.quantization.formats.gguf import GGUF_TYPES, GgufType

__all__ = ["GgufFile", "GgufTensor", "check_scales"]

PLAIN: dict[int, tuple[str, torch.dtype]] = {
    0: ("F32", torch.float32),
    1: ("F16", torch.float16),
    30: ("BF16", torch.bfloat16),
}
_BLOCKS = {form.number: form for form in GGUF_TYPES.values()}
_ACCEPTED = ", ".join([*(name for name, _ in PLAIN.values()), *GGUF_TYPES])

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
MOST_DIMENSIONS = 4
LARGEST_ALIGNMENT = 1 << 16


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: its shape in torch's order, the name of its type, and where its bytes are."""

    name: str
    shape: tuple[int, ...]
    type: str
    begin: int
    nbytes: int


class GgufFile:
    """A GGUF file, mapped into memory.

    path: of the file.
    metadata: its key-value pairs; arrays are lists.
    tensors: what is in it, by name.
    Raises FileNotFoundError where there is no file, ValueError with one line that names the file, the tensor or key,
    and what is accepted, for anything that is not as the format says: sizes that reach beyond the file, unknown types,
    names that are there twice, tensors that overlap.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist, expected a .gguf file")
        size = self.path.stat().st_size
        self._bytes = np.memmap(self.path, np.uint8, mode="r") if size else np.empty(0, np.uint8)
        cursor = _Cursor(str(self.path), self._bytes)
        if cursor.take(4, "the header") != b"GGUF":
            raise ValueError(f"{self.path} does not begin with GGUF, expected a .gguf file")
        version = cursor.number("I", "the header")
        if version not in (2, 3):
            raise ValueError(f"{self.path}: version is {version}, expected 2 or 3 in little-endian order")
        tensors, pairs = cursor.count(24, "the number of tensors"), cursor.count(13, "the number of keys")
        self.metadata = _metadata(cursor, pairs)
        self.tensors = self._infos(cursor, tensors)

    def _infos(self, cursor: _Cursor, count: int) -> dict[str, GgufTensor]:
        infos: list[tuple[str, tuple[int, ...], int, int]] = []
        names: set[str] = set()
        for i in range(count):
            name = cursor.string(f"the name of tensor {i}")
            shown = _shown(name)
            if name in names:
                raise ValueError(f"{self.path}: tensor {shown} is there twice, expected each once")
            names.add(name)
            dims = cursor.number("I", shown)
            if not 1 <= dims <= MOST_DIMENSIONS:
                raise ValueError(f"{self.path}: tensor {shown} has {dims} dimensions, expected 1 to {MOST_DIMENSIONS}")
            shape = tuple(reversed([cursor.number("Q", shown) for _ in range(dims)]))
            infos.append((name, shape, cursor.number("I", shown), cursor.number("Q", shown)))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(
                f"{self.path}: general.alignment is {ascii(alignment)[:100]}, expected a power of two from 8 to "
                f"{LARGEST_ALIGNMENT}"
            )
        start = -(-cursor.at // alignment) * alignment
        found = [self._placed(start, alignment, *info) for info in infos]
        end, before = start, ""
        for tensor in sorted(found, key=lambda each: each.begin):
            if tensor.begin < end:
                raise ValueError(
                    f"{self.path}: tensor {tensor.name} begins within {before}, expected one after the other"
                )
            end, before = tensor.begin + tensor.nbytes, tensor.name
        return {tensor.name: tensor for tensor in found}

    def _placed(
        self, start: int, alignment: int, name: str, shape: tuple[int, ...], number: int, offset: int
    ) -> GgufTensor:
        where = f"{self.path}: tensor {_shown(name)}"
        elements = math.prod(shape)
        if elements == 0:
            raise ValueError(f"{where} has shape {list(shape)}, expected sizes of at least 1")
        if number in PLAIN:
            kind, dtype = PLAIN[number]
            nbytes = elements * dtype.itemsize
        elif number in _BLOCKS:
            form = _BLOCKS[number]
            if shape[-1] % form.columns:
                raise ValueError(
                    f"{where} of type {form.name} has rows of {shape[-1]}, expected a multiple of {form.columns}"
                )
            kind, nbytes = form.name, elements // form.columns * form.nbytes
        else:
            raise ValueError(f"{where} has type {number}, expected {_ACCEPTED}")
        if offset % alignment:
            raise ValueError(f"{where} is at offset {offset}, expected a multiple of {alignment}")
        if start + offset + nbytes > len(self._bytes):
            raise ValueError(
                f"{where} of shape {list(shape)} ends at byte {start + offset + nbytes}, expected within the file's "
                f"{len(self._bytes)}"
            )
        return GgufTensor(name, shape, kind, start + offset, nbytes)

    def floating(self, name: str) -> Tensor:
        """Copy a tensor of type F32, F16 or BF16.  Raises ValueError for other types, KeyError for other names."""
        info = self.tensors[name]
        for kind, dtype in PLAIN.values():
            if kind == info.type:
                return self._raw(info).view(dtype).view(info.shape)
        raise ValueError(f"{self.path}: tensor {_shown(name)} has type {info.type}, expected F32, F16 or BF16")

    def packed(self, name: str) -> PackedWeight:
        """Pack a matrix [n, k] in one of GGUF's block types, without requantizing it.

        Raises ValueError for other types and shapes, and for scales that are NaN or infinite; KeyError for other names.
        """
        info = self.tensors[name]
        if info.type not in GGUF_TYPES:
            raise ValueError(
                f"{self.path}: tensor {_shown(name)} has type {info.type}, expected {', '.join(GGUF_TYPES)}"
            )
        if len(info.shape) != 2:
            raise ValueError(f"{self.path}: tensor {_shown(name)} has shape {list(info.shape)}, expected a matrix")
        packed = GGUF_TYPES[info.type].read(self.blocks(name))
        check_scales(packed, f"{self.path}: tensor {name}")
        return packed

    def blocks(self, name: str) -> Tensor:
        """Copy the blocks of a tensor in one of GGUF's block types: [rows, blocks of a row, bytes], uint8.

        Dimensions but the last are rows.  Raises KeyError for other types and names.
        """
        info = self.tensors[name]
        form: GgufType = GGUF_TYPES[info.type]
        return self._raw(info).view(-1, info.shape[-1] // form.columns, form.nbytes)

    def values(self, name: str) -> Tensor:
        """Return the values of a tensor of any type and shape, fp32.  Raises ValueError for scales that are NaN or
        infinite.
        """
        info = self.tensors[name]
        if info.type not in GGUF_TYPES:
            return self.floating(name).float()
        packed = GGUF_TYPES[info.type].read(self.blocks(name))
        check_scales(packed, f"{self.path}: tensor {name}")
        return packed.dequantized().view(info.shape)

    def _raw(self, info: GgufTensor) -> Tensor:
        return torch.from_numpy(np.array(self._bytes[info.begin : info.begin + info.nbytes]))


def check_scales(packed: PackedWeight, what: str) -> None:
    """Raise ValueError, naming `what`, if scales are NaN or infinite."""
    for tensor in packed.tensors.values():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{what} has scales that are NaN or infinite, expected finite ones")


def _shown(name: str) -> str:
    """Shorten a name from a file for use in a message: one line, limited length."""
    return (name if name.isprintable() else ascii(name))[:100]


class _Cursor:
    """Reads a file's header from the front; whatever is not there is a ValueError that says what was read."""

    def __init__(self, path: str, data: np.ndarray[Any, Any]) -> None:
        self.path, self._data = path, data
        self.at = 0

    def take(self, size: int, what: str) -> bytes:
        if size > len(self._data) - self.at:
            raise ValueError(
                f"{self.path}: {what} is {size} bytes from byte {self.at} on, expected within the file's "
                f"{len(self._data)}"
            )
        self.at += size
        return self._data[self.at - size : self.at].tobytes()

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def count(self, smallest: int, what: str) -> int:
        """Read a number of entries that take at least `smallest` bytes each."""
        count: int = self.number("Q", what)
        if count * smallest > len(self._data) - self.at:
            raise ValueError(f"{self.path}: {what} is {count}, more than {len(self._data)} bytes hold")
        return count

    def string(self, what: str) -> str:
        raw = self.take(self.count(1, what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: {what} is {raw[:32]!r}, expected text in UTF-8") from None

    def value(self, kind: int, what: str) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise ValueError(f"{self.path}: {what} has type {kind}, expected 0 to 12")
        kind = self.number("I", what)
        if kind == _ARRAY:
            raise ValueError(f"{self.path}: {what} is an array of arrays, expected numbers or strings")
        if kind not in _NUMBERS:
            return [self.value(kind, what) for _ in range(self.count(8, what))]
        size = struct.calcsize(f"<{_NUMBERS[kind]}")
        count = self.count(size, what)
        return list(struct.unpack(f"<{count}{_NUMBERS[kind]}", self.take(count * size, what)))


def _metadata(cursor: _Cursor, pairs: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i in range(pairs):
        key = cursor.string(f"key {i}")
        if key in found:
            raise ValueError(f"{cursor.path}: key {_shown(key)} is there twice, expected each once")
        found[key] = cursor.value(cursor.number("I", _shown(key)), _shown(key))
    return found
