"""The built library disassembled: each instruction set's hot loops have the instructions that they are written for."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from dataclasses import dataclass

import pytest

from llmkern import _native

built = pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))


@dataclass(frozen=True)
class Meant:
    """`instruction` on `register`s is in a loop of a function of namespace `isa` whose name has `function`."""

    isa: str
    function: str
    instruction: str
    register: str

    def __str__(self) -> str:
        return f"{self.isa}-{self.function}-{self.instruction}"


# Products by their scheme (csrc/cpu/products/schemes.h), and by how the weight is read: streamed for few rows, else in
# packed blocks.
INTEGERS, FLOATS = "Integers", "Floats"
PACKED = (r"stream_panel<.*SixBitCodes", r"multiply_tile<")
MEANT = [
    Meant("portable", rf"stream\w*<.*{INTEGERS}", "pmaddwd", "xmm"),
    Meant("portable", rf"block\w*<.*{INTEGERS}", "pmaddwd", "xmm"),
    Meant("avx2", rf"stream\w*<.*{INTEGERS}", "vpmaddwd", "ymm"),
    Meant("avx2", rf"block\w*<.*{INTEGERS}", "vpmaddwd", "ymm"),
    Meant("avx2", rf"block\w*<.*{FLOATS}", "vfmadd...ps", "ymm"),
    Meant("avx2_vnni", rf"stream\w*<.*{INTEGERS}", "vpdpbusd", "ymm"),
    Meant("avx2_vnni", r"stream\w*<.*Digits", "vpdpbusd", "ymm"),
    Meant("avx2_vnni", rf"block\w*<.*{INTEGERS}", "vpdpbusd", "ymm"),
    Meant("avx512", rf"stream\w*<.*{INTEGERS}", "vpmaddwd", "zmm"),
    Meant("avx512", rf"block\w*<.*{INTEGERS}", "vpmaddwd", "zmm"),
    Meant("avx512", rf"block\w*<.*{FLOATS}", "vfmadd...ps", "zmm"),
    Meant("avx512_vnni", rf"stream\w*<.*{INTEGERS}", "vpdpbusd", "zmm"),
    Meant("avx512_vnni", r"stream\w*<.*Digits", "vpdpbusd", "zmm"),
    Meant("avx512_vnni", rf"block\w*<.*{INTEGERS}", "vpdpbusd", "zmm"),
    Meant("avx512_bf16", rf"stream\w*<.*{INTEGERS}", "vpdpbusd", "zmm"),
    Meant("avx512_bf16", r"stream\w*<.*Bf16", "vdpbf16ps", "zmm"),
    Meant("avx512_bf16", r"block\w*<.*Bf16", "vdpbf16ps", "zmm"),
    Meant("amx", rf"stream\w*<.*{INTEGERS}", "vpdpbusd", "zmm"),
    Meant("amx", r"block\w*<.*TileIntegers", "tdpbssd", "tmm"),
    Meant("amx", r"block\w*<.*TileBf16", "tdpbf16ps", "tmm"),
    Meant("amx", r"tasks<.*TileRows", "tdpbf16ps", "tmm"),
    *[Meant("avx2", function, "vpmaddubsw", "ymm") for function in PACKED],
    *[Meant("avx512", function, "vpmaddubsw", "zmm") for function in PACKED],
    *[Meant("avx2_vnni", function, "vpdpbusd", "ymm") for function in PACKED],
    *[Meant(isa, function, "vpdpbusd", "zmm") for isa in ("avx512_vnni", "amx") for function in PACKED],
]

# What a CPU of each instruction set need not have, wherever it is in the function.
LACKING = {
    "portable": r"%[yz]mm|%k[1-7]|%tmm",
    "avx2": r"%zmm|%k[1-7]|%tmm|vpdp",
    "avx2_vnni": r"%zmm|%k[1-7]|%tmm",
    "avx512": r"%tmm|vpdp|vdpbf16ps|vcvtne",
    "avx512_vnni": r"%tmm|vdpbf16ps|vcvtne",
    "avx512_bf16": r"%tmm",
}

_FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
_LINE = re.compile(r"^ *([0-9a-f]+):\s+((?:\{\w+\} )?\S+) *(.*)$")


@dataclass
class Function:
    """lines: (address, instruction, operands).  loops: from where a jump goes back to, to the jump."""

    name: str
    lines: list[tuple[int, str, str]]

    def loops(self) -> list[tuple[int, int]]:
        if not self.lines:
            return []
        first = self.lines[0][0]
        found = []
        for address, instruction, operands in self.lines:
            target = re.match(r"([0-9a-f]+) <", operands) if instruction.startswith("j") else None
            if target and first <= int(target[1], 16) <= address:
                found.append((int(target[1], 16), address))
        return found

    def has_in_a_loop(self, instruction: str, register: str) -> bool:
        loops = self.loops()
        pattern = re.compile(rf"(\{{\w+\}} )?{instruction}$")
        return any(
            pattern.match(name) and f"%{register}" in operands and any(begin <= at <= end for begin, end in loops)
            for at, name, operands in self.lines
        )


@pytest.fixture(scope="module")
def functions() -> dict[str, list[Function]]:
    """The library's functions by instruction set."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(_native.path())]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, list[Function]] = defaultdict(list)
    current: Function | None = None
    for line in text.splitlines():
        if header := _FUNCTION.match(line):
            isa = re.search(rf"llmkern::({'|'.join(sorted(_native.CPU_ISAS, key=len, reverse=True))})::", header[1])
            current = Function(header[1], []) if isa else None
            if isa and current:
                found[isa[1]].append(current)
        elif current is not None and (parts := _LINE.match(line)):
            current.lines.append((int(parts[1], 16), parts[2], parts[3]))
    if not found:
        pytest.skip(f"{_native.path()} is stripped, or built for another processor")
    return found


@built
@pytest.mark.parametrize("meant", MEANT, ids=str)
def test_hot_loops_have_the_instructions_meant(meant: Meant, functions: dict[str, list[Function]]) -> None:
    named = [f for f in functions[meant.isa] if re.search(meant.function, f.name)]
    assert named, f"{meant.isa} has no function {meant.function}"
    assert any(f.has_in_a_loop(meant.instruction, meant.register) for f in named)


@built
@pytest.mark.parametrize("isa", LACKING)
def test_no_instruction_is_of_a_better_set(isa: str, functions: dict[str, list[Function]]) -> None:
    lacking = re.compile(LACKING[isa])
    for function in functions[isa]:
        for address, instruction, operands in function.lines:
            assert not lacking.search(f"{instruction} {operands}"), (
                f"{address:x} in {function.name}: {instruction} {operands}"
            )
