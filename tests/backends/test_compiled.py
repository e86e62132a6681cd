"""What nvcc made of the CUDA kernels, read from the built objects: spills and narrow accesses show without a GPU."""

from __future__ import annotations

import fnmatch
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OBJECTS = sorted((ROOT / "build" / "native" / "cuda").glob("*.cu.o"))

# A part of a kernel's demangled name, and the instructions that its SASS must have.  Kernels without vectors of 16
# bytes are those for rows that are not aligned.
WANTED = {
    r"norm_kernel<.*, [48], \d>": ["LDG.E.128", "STG.E.128"],
    r"norm_backward_kernel<.*, [48], \d>": ["LDG.E.128", "STG.E.128"],
    r"sum_blocks_kernel": [],  # columns of floats, one for each lane
    r"quantize_int8_kernel<.*, [48], \d>": ["LDG.E.128"],
    r"activate_codes_kernel<.*, [48], \d, ": ["LDG.E.128"],
    r"activate_backward_kernel<.*, [48], ": ["LDG.E.128", "STG.E.128"],
    r"activate_kernel<.*, [48], ": ["LDG.E.128", "STG.E.128"],
    r"rope_kernel<.*, [48], ": ["LDG.E.128", "STG.E.128"],
    r"int8_matmul_kernel<signed char, .*>": ["IMMA.16832.S8.S8", "LDSM.16.M88.4"],
    r"int8_matmul_kernel<llmkern::BFloat16, .*>": ["HMMA.16816.F32.BF16", "LDSM.16.M88.4", "LDS.64"],
    r"int8_matmul_kernel<llmkern::Float16, .*>": ["HMMA.16816.F32 ", "LDSM.16.M88.4", "LDS.64"],
    r"int8_matmul_kernel<.*, true, \w+>": ["LDGSTS.E.*128"],
    r"int8_matmul_kernel<.*, false, \w+>": ["STS.128"],
    r"int8_matmul_kernel<.*, true>": ["LDS.128", "STG.E.128"],
    r"int8_decode_kernel<signed char, \d, \w+>": ["IMMA.16832.S8.S8"],
    r"int8_decode_kernel<llmkern::BFloat16, \d, \w+>": ["HMMA.16816.F32.BF16"],
    r"int8_decode_kernel<llmkern::Float16, \d, \w+>": ["HMMA.16816.F32 "],
    r"int8_decode_kernel<.*, \d, true>": ["LDG.E.NA.128", "LDG.E.128"],
    r"sum_parts_kernel<\w+, 4>": ["LDG.E.128", "STG.E.128"],
    r"sum_parts_kernel<\w+, 1>": [],
    r"attention_kernel<": ["HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.*128", "STG.E.128"],
    r"attention_decode_kernel<": ["HMMA.16816.F32", "LDGSTS.E.*128", "LDSM.16.M88.4", "LDSM.16.MT88.4", "STG.E.128"],
    r"combine_kernel<": ["LDG.E.128"],
    r"attention_gradient_kernel<.*\)0>": ["HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS.E.*128"],
    r"attention_gradient_kernel<.*\)[1-4]>": ["HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.*128"]
    + ["STG.E.128"],
    r"attention_dmask_kernel": ["HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS.E.*128"],
    r"attention_prepare_kernel": ["LDG.E.128"],
    r"attention_sink_kernel": [],  # a float for each query
    r"probe_kernel": [],  # nothing
}


@functools.cache
def cuobjdump() -> str | None:
    """From PATH, CUDA_HOME, or the wheels of NVIDIA and Triton."""
    packages = [Path(site) for site in sys.path]
    folders = [folder for site in packages for folder in site.glob("nvidia/*/bin")]
    folders += [site / "triton" / "backends" / "nvidia" / "bin" for site in packages]
    search = [os.environ.get("PATH", ""), os.environ.get("CUDA_HOME", "") + "/bin", *map(str, folders)]
    return shutil.which("cuobjdump", path=os.pathsep.join(search))


def dump(option: str, path: Path) -> str:
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump was found neither in PATH nor in CUDA_HOME nor in a wheel")
    return subprocess.run([tool, option, str(path)], check=True, capture_output=True, text=True).stdout


@functools.cache
def demangled(name: str) -> str:
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt (binutils) is not installed")
    return subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout.strip()


needs_objects = pytest.mark.skipif(not OBJECTS, reason="no CUDA part of the library was built here")
each_object = pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)


@needs_objects
@each_object
def test_no_kernel_spills(path: Path) -> None:
    """Neither a stack nor local memory, for any architecture."""
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump("-res-usage", path))
    assert found
    for name, _, stack, local in found:
        assert (stack, local) == ("0", "0"), f"{demangled(name)}: {stack} bytes of stack, {local} of local memory"


@needs_objects
@each_object
def test_instructions(path: Path) -> None:
    """Accesses of 16 bytes and tensor cores where they are meant, in every image."""
    for function in dump("-sass", path).split("Function : ")[1:]:
        name, _, code = function.partition("\n")
        for pattern, instructions in WANTED.items():
            if not re.search(pattern, demangled(name)):
                continue
            for instruction in instructions:
                assert re.search(instruction, code), f"{demangled(name)} has no {instruction}"


@needs_objects
def test_every_kernel_is_judged() -> None:
    names = {demangled(name) for path in OBJECTS for name in re.findall(r"Function (\S+):", dump("-res-usage", path))}
    for pattern in WANTED:
        assert any(re.search(pattern, name) for name in names), f"no kernel is like {pattern}"
    for name in names:
        one_by_one = re.search(r"<[^<]*, 1, ", name)  # for rows that are not aligned
        assert one_by_one or any(re.search(pattern, name) for pattern in WANTED), f"{name} is not judged"


def fitting(registers: int, threads: int, shared_bytes: int) -> int:
    """Blocks on an SM of compute capability 8.0, as the CUDA C++ Programming Guide counts its resources."""
    warps = threads // 32
    by_registers = 65536 // (warps * -(-registers * 32 // 256) * 256)
    by_shared_memory = 164 * 1024 // (-(-shared_bytes // 1024) * 1024 + 1024)
    return min(64 // warps, 32, by_registers, by_shared_memory)


@needs_objects
def test_the_table_tells_the_occupancy() -> None:
    """Each kernel's occupancy is that of the image that needs the most registers."""
    table = pytest.importorskip("llmkern._C", reason="llmkern._C was not built").kernels()
    most: dict[str, int] = {}
    for path in OBJECTS:
        for name, registers in re.findall(r"Function (\S+):\s+REG:(\d+)", dump("-res-usage", path)):
            called = re.sub(r"^.*?\(anonymous namespace\)::(\w+(<.*>)?)\(.*", r"\1", demangled(name))
            if called == "probe_kernel":  # which is asked for, and never launched
                continue
            entries = [kernel for kernel in table if fnmatch.fnmatchcase(called, kernel["function"])]
            assert len(entries) == 1, f"{called} is {len(entries)} times in the table"
            function = entries[0]["function"]
            most[function] = max(most.get(function, 0), int(registers))
    for kernel in table:
        function, threads = kernel["function"], kernel["threads"]
        assert function in most, f"no kernel is like {function}"
        assert most[function] <= kernel["registers"], function
        blocks = fitting(most[function], threads, kernel["shared_bytes"])
        assert kernel["blocks_per_sm"] == blocks, f"{function}: {most[function]} registers"
        assert kernel["occupancy"] == blocks * threads / 2048
