"""The instructions of Arm's kernels: those meant are there, and no set has another's."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from emulator import CPUS, FOLDER, PREFIX, Missing, build, tool

# Products that a set adds to the one before it.
ADDED = {
    "portable": {"smlal", "smlal2", "fmla"},
    "neon_dotprod": {"sdot"},
    "neon_i8mm": {"smmla", "bfmmla", "bfdot"},
}
# For each kind of product the most instructions of a loop for one product, where rows are many.
BLOCKS = {
    "portable": {"fmla": 1.5, "smlal": 5.0},
    "neon_dotprod": {"fmla": 1.5, "sdot": 1.5},
    "neon_i8mm": {"fmla": 1.5, "smmla": 2.5, "bfmmla": 2.5},
}
SCALAR = re.compile(r"f(n?m(add|sub)|mul) s\d+, s\d+")


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str


@pytest.fixture(scope="module")
def functions() -> dict[str, list[Instruction]]:
    """The program's functions, by their names in full."""
    try:
        program, _ = build()
        objdump = tool(f"{PREFIX}objdump")
    except Missing as why:
        pytest.skip(str(why))
    command = [objdump, "--disassemble", "--no-show-raw-insn", "--demangle", str(program)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, list[Instruction]] = {}
    here: list[Instruction] = []
    for line in text.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            here = found.setdefault(start[1], [])
        elif match := re.match(r"\s+([0-9a-f]+):\s+(\S+)\s*(.*)", line):
            here.append(Instruction(int(match[1], 16), match[2], match[3]))
    return found


def of_set(functions: dict[str, list[Instruction]], isa: str) -> dict[str, list[Instruction]]:
    return {name: body for name, body in functions.items() if f"llmkern::{isa}::" in name}


def loops(body: list[Instruction]) -> Iterator[list[Instruction]]:
    """The innermost loops: from a branch's target to the branch behind it, with no other within."""
    at = {instruction.address: i for i, instruction in enumerate(body)}
    spans = []
    for i, instruction in enumerate(body):
        target = re.search(r"([0-9a-f]+) <", instruction.operands)
        if re.match(r"b\.|b$|cbn?z|tbn?z", instruction.name) and target:
            first = at.get(int(target[1], 16), len(body))
            if first <= i:
                spans.append((first, i))
    for first, last in spans:
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans):
            yield body[first : last + 1]


@pytest.mark.parametrize("isa", CPUS.values())
def test_each_set_has_its_products_and_no_better_ones(functions: dict[str, list[Instruction]], isa: str) -> None:
    bodies = of_set(functions, isa).values()
    used = Counter(instruction.name for body in bodies for instruction in body)
    sets = list(ADDED)
    for other in sets:
        for name in ADDED[other]:
            if other == isa:
                assert used[name] >= 16, name
            elif sets.index(other) > sets.index(isa):
                assert used[name] == 0, name


@pytest.mark.parametrize(("isa", "product"), [(isa, name) for isa, names in BLOCKS.items() for name in names])
def test_blocks_of_products_are_little_else(functions: dict[str, list[Instruction]], isa: str, product: str) -> None:
    """The loop with the most products of a kind, which serves many rows: few loads for each, hardly a store."""
    found = [
        (Counter(i.name for i in loop)[product], loop)
        for name, body in of_set(functions, isa).items()
        if "block_strips" in name
        for loop in loops(body)
    ]
    most = max(count for count, _ in found)
    assert most >= 20
    for count, loop in found:
        if count == most:
            assert len(loop) <= BLOCKS[isa][product] * count
            assert sum(i.name.startswith("st") for i in loop) <= count // 32


@pytest.mark.parametrize("isa", CPUS.values())
def test_no_loop_is_scalar(functions: dict[str, list[Instruction]], isa: str) -> None:
    """Floats are multiplied one by one beside vectors only, or beside a row's logarithm."""
    for name, body in of_set(functions, isa).items():
        # A row's last steps are one number each, as are the few experts that are chosen for it.
        if re.search("cross_entropy|keep_top|::route", name):
            continue
        for loop in loops(body):
            scalar = [i for i in loop if SCALAR.match(f"{i.name} {i.operands}")]
            vectors = [i for i in loop if re.match(r"v\d+\.4s", i.operands)]
            assert not scalar or vectors or "bl" in {i.name for i in loop}, name


@pytest.mark.parametrize("isa", CPUS.values())
def test_no_library_computes_for_the_kernels(functions: dict[str, list[Instruction]], isa: str) -> None:
    """Where a vector is taken apart, compilers call functions of the C library."""
    objects = [str(path) for path in (FOLDER / "kernels" / "cpu").rglob(f"*.{isa}.o")]
    command = [tool(f"{PREFIX}nm"), "--undefined-only", "--demangle", *objects]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    called = {name for name in re.findall(r" U (.*)", text) if "llmkern::" not in name}
    assert called <= {"memcpy", "memmove", "memset", "logf", "getauxval", "strcmp", "_GLOBAL_OFFSET_TABLE_"}
