"""The reader of GGUF files: what it reads is what gguf wrote, and what is wrong is refused in one line."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern.quantization.formats.gguf import GGUF_TYPES
from llmkern.quantization.gguf_file import GgufFile
from llmkern.testing.compare import assert_same_bits

gguf = pytest.importorskip("gguf")

ROWS, COLUMNS = 5, 512


def blocks(name: str) -> np.ndarray:
    """Random blocks with finite scales: every fp16 among them is 1."""
    form = GGUF_TYPES[name]
    raw = np.random.default_rng(0).integers(0, 256, (ROWS, COLUMNS // form.columns, form.nbytes), dtype=np.uint8)
    one = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    places = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(name, (0,))
    for place in places:
        raw[..., place : place + 2] = one
    return raw.reshape(ROWS, -1)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ä", ""])
    writer.add_array("numbers", [1.5, -2.0])
    writer.add_bool("flag", True)
    writer.add_tensor("norm.weight", np.arange(7, dtype=np.float32))
    writer.add_tensor("half", np.ones((2, 3), np.float16))
    for name in GGUF_TYPES:
        writer.add_tensor(f"{name}.weight", blocks(name), raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_everything_is_read_as_it_was_written(file: Path) -> None:
    read = GgufFile(file)
    assert read.metadata["llama.block_count"] == 3
    assert read.metadata["tokenizer.ggml.tokens"] == ["a", "ä", ""]
    assert (read.metadata["numbers"], read.metadata["flag"]) == ([1.5, -2.0], True)
    assert_same_bits([read.floating("norm.weight")], [torch.arange(7.0)])
    assert read.floating("half").shape == (2, 3)
    for name in GGUF_TYPES:
        expected = gguf.dequantize(blocks(name), gguf.GGMLQuantizationType[name]).astype(np.float32)
        packed = read.packed(f"{name}.weight")
        assert (packed.n, packed.k) == (ROWS, COLUMNS) == read.tensors[f"{name}.weight"].shape
        assert_same_bits(packed.dequantized(), torch.from_numpy(expected))
    with pytest.raises(ValueError, match=r"model.gguf: tensor half has type F16, expected Q4_0, Q4_1"):
        read.packed("half")
    with pytest.raises(ValueError, match="model.gguf: tensor Q8_0.weight has type Q8_0, expected F32, F16 or BF16"):
        read.floating("Q8_0.weight")


def header(*tensors: tuple[bytes, tuple[int, ...], int, int], pairs: bytes = b"", count: int = 0) -> bytes:
    """A file's header: tensors as (name, dimensions, type, offset)."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count) + pairs
    for name, dims, kind, offset in tensors:
        out += struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return out


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


FULL = b"\0" * 4096


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the header is 4 bytes from byte 0 on, expected within the file's 0"),
        (b"GGML" + FULL, "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<I", 1) + FULL, "version is 1, expected 2 or 3"),
        (b"GGUF" + struct.pack(">I", 3) + FULL, "version is 50331648, expected 2 or 3 in little-endian order"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "the number of tensors is 1152921504606846976, more than"),
        (header((b"w", (2**32, 2**32, 2**32), 0, 0)) + FULL, r"tensor w of shape \[4294967296, .* within the file's"),
        (header((b"w", (64,), 0, 2**62)) + FULL, "tensor w of shape .64. ends at byte"),
        (header((b"w", (64, 0), 0, 0)) + FULL, r"tensor w has shape \[0, 64\], expected sizes of at least 1"),
        (header((b"w", (64,), 0, 8)) + FULL, "tensor w is at offset 8, expected a multiple of 32"),
        (header((b"w", (64,), 9, 0)) + FULL, "tensor w has type 9, expected F32, F16, BF16, Q4_0, Q4_1"),
        (header((b"w", (65,), 8, 0)) + FULL, "tensor w of type Q8_0 has rows of 65, expected a multiple of 32"),
        (header((b"w", (1,) * 5, 0, 0)) + FULL, "tensor w has 5 dimensions, expected 1 to 4"),
        (header((b"w", (8,), 0, 0), (b"w", (8,), 0, 32)) + FULL, "tensor w is there twice"),
        (header((b"v", (64,), 0, 0), (b"w", (8,), 0, 32)) + FULL, "tensor w begins within v"),
        (header((b"\xff", (8,), 0, 0)) + FULL, "the name of tensor 0 is b'.xff', expected text in UTF-8"),
        (header(pairs=string(b"k") + struct.pack("<I", 77), count=1) + FULL, "k has type 77, expected 0 to 12"),
        (header(pairs=string(b"k") + struct.pack("<IIQ", 9, 9, 1), count=1) + FULL, "k is an array of arrays"),
        (
            header(pairs=string(b"k") + struct.pack("<IIQ", 9, 4, 2**40), count=1) + FULL,
            "k is 1099511627776, more than",
        ),
        (
            header(pairs=string(b"general.alignment") + struct.pack("<II", 4, 3), count=1) + FULL,
            "general.alignment is 3, expected a power of two from 8 to 65536",
        ),
        (
            header(pairs=2 * (string(b"k") + struct.pack("<IB", 0, 1)), count=2) + FULL,
            "key k is there twice, expected each once",
        ),
    ],
)
def test_hostile_files_are_refused_in_one_line(data: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"bad.gguf:? .*{says}|bad.gguf {says}") as found:
        GgufFile(path)
    assert "\n" not in str(found.value)


def test_what_is_no_file_and_what_has_no_meaning(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.gguf does not exist, expected a .gguf file"):
        GgufFile(tmp_path / "nothing.gguf")
    path = tmp_path / "nan.gguf"
    start = header((b"w", (32,), 8, 0), (b"m", (32, 2), 8, 64))
    data = start + b"\0" * (-len(start) % 32) + b"\0" * 64 + b"\0" * 34 + b"\0\x7e" + b"\0" * 100
    path.write_bytes(data)
    read = GgufFile(path)
    with pytest.raises(ValueError, match=r"nan.gguf: tensor w has shape \[32\], expected a matrix"):
        read.packed("w")
    with pytest.raises(ValueError, match="nan.gguf: tensor m has scales that are NaN or infinite"):
        read.packed("m")


def read_all(path: Path) -> str | None:
    """The refusal of a file, or of a tensor in it; None where all of it is read."""
    try:
        read = GgufFile(path)
        for name, info in read.tensors.items():
            if info.type in GGUF_TYPES:
                read.packed(name)
            else:
                read.floating(name)
    except ValueError as error:
        return str(error)
    return None


@settings(max_examples=150, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=6),
    length=st.integers(0, 4000),
)
def test_a_damaged_file_is_read_or_refused(file: Path, changes: list[tuple[int, int]], length: int) -> None:
    """Never anything but a ValueError of one line, whatever bytes of the header are changed and wherever it ends."""
    data = bytearray(file.read_bytes())
    for place, value in changes:
        data[place] = value
    damaged = file.with_name("damaged.gguf")
    damaged.write_bytes(bytes(data[: max(len(data) - length, 0)] if length > 2000 else data))
    message = read_all(damaged)
    assert message is None or (str(damaged) in message and "\n" not in message)
