"""csrc/cuda's kernels compiled for the SIMT machine of csrc/simt, and the machine's switches."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmkern import dispatch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402
from toolchain import Unavailable  # noqa: E402

CONTRACTED = ["-march=x86-64-v3"] if platform.machine() == "x86_64" else []  # with fma, as nvcc contracts
# -g1 has the chains of inlined calls.  What would give a call another's place in them, or none, is off.
PLACES = ["-g1", "-fno-optimize-sibling-calls", "-fno-crossjumping", "-fno-tree-tail-merge"]
FLAGS = ["-std=c++20", "-O2", *CONTRACTED, "-ffp-contract=fast", *PLACES, "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-DLLMKERN_SIMT", "-Wall", "-Wextra"]
# A pragma of nvcc's; registers that are set under the same condition as they are used; __half, copied as bytes.
FLAGS += ["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-class-memaccess"]
TORCH_LIBRARIES = ["-ltorch", "-ltorch_cpu"]


@functools.cache
def compiler_and_headers() -> tuple[str, list[str]]:
    """The C++ compiler, and the folders of CUDA's headers: nvcc's own.  Raises Unavailable, with the reason."""
    compiler = toolchain.find_compiler()
    nvcc, why_not = toolchain.find_nvcc()
    if nvcc is None:
        raise Unavailable(f"CUDA's headers are needed: {why_not}")
    plan = subprocess.run([nvcc, "-dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True).stderr
    found = re.search(r"INCLUDES=(.*)", plan)
    if found is None:
        raise Unavailable(f"{nvcc} does not say where CUDA's headers are")
    return compiler, re.findall(r'"-I([^"]+)"', found[1])


def torch_flags() -> list[str]:
    """For sources that use torch's stable ABI, as setup.py compiles them, and for linking them."""
    torch_folder = toolchain.folder_of("torch")
    return [toolchain.ABI, "-isystem", str(torch_folder / "include"), f"-L{torch_folder / 'lib'}"]


def build(
    name: str,
    sources: Sequence[Path],
    flags: Sequence[str] = (),
    libraries: Sequence[str] = (),
    first: Sequence[Path] = (),
) -> Path:
    """A shared library of the sources and the machine, under build/simt; ninja compiles what has changed.

    Headers are looked for in the folders of `first` before all others.
    """
    compiler, headers = compiler_and_headers()
    folder = ROOT / "build" / "simt"
    includes = [f"-I{path}" for path in (*first, ROOT / "csrc" / "include", ROOT / "csrc", ROOT / "csrc" / "cuda")]
    tool = [compiler, *FLAGS, *includes, *(part for path in headers for part in ("-isystem", path)), *flags]
    key = hashlib.sha256(" ".join(tool).encode()).hexdigest()[:12]
    text = [f"builddir = {folder / key}\n", toolchain.RULES]
    objects = []
    for source in [*sorted((ROOT / "csrc" / "simt").glob("*.cpp")), *sources]:
        try:
            stem = source.relative_to(ROOT)
        except ValueError:
            stem = Path(hashlib.sha256(str(source).encode()).hexdigest()[:12]) / source.name
        cuda = ["-x", "c++"] if source.suffix == ".cu" else []
        objects.append(toolchain.build(text, "compile", folder / key / f"{stem}.o", [source], [*tool, *cuda]))
    output = folder / f"{name}-{key}.so"
    toolchain.build(text, "link", output, objects, [compiler, "-shared", "-Wl,-Bsymbolic", *flags], " ".join(libraries))
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / f"{name}-{key}.ninja"
    with (folder / "lock").open("w") as lock:  # pytest's workers build the same
        fcntl.flock(lock, fcntl.LOCK_EX)
        script.write_text("".join(text))
        run = subprocess.run([toolchain.find_ninja(), "-f", script], capture_output=True, text=True)
    if run.returncode != 0:
        raise AssertionError(f"the kernels did not compile for the SIMT machine:\n{run.stdout}")
    return output


COPIES = ("at once", "late", "random")  # when asynchronous copies land


class Machine:
    """One loaded library: `machine.library` has its functions, the rest its switches."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        for function in ("simt_take_error", "simt_take_counters", "simt_take_bytes", "simt_take_meetings"):
            getattr(self.library, function).restype = ctypes.c_char_p
        self.library.simt_register.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p)
        self.library.simt_forget.argtypes = (ctypes.c_void_p,)
        self.library.simt_set.argtypes = (ctypes.c_uint64, *[ctypes.c_int] * 3, ctypes.c_uint64, *[ctypes.c_int] * 2)
        self._places: dict[str, tuple[str, ...]] = {}

    def set(
        self,
        *,
        seed: int = 0,
        copies: str = "at once",
        sm_count: int = 4,
        capability: tuple[int, int] = (9, 0),
        approximate: int = 0,
        count: bool = False,
        fault: int = 0,
    ) -> None:
        """Set the seed of all orders, when asynchronous copies land, the GPU's properties, the salt by which
        approximate instructions err (0: they do not), whether counters run from zero on, and the planted fault."""
        if count:
            self.library.simt_take_counters()
            self.library.simt_take_bytes()
        self.library.simt_set(
            seed,
            COPIES.index(copies),
            sm_count,
            10 * capability[0] + capability[1],
            approximate,
            int(count),
            fault,
        )

    def places(self, addresses: Sequence[str]) -> list[tuple[str, ...]]:
        """For each place that a sentence names, "function file:line" from the instruction out to the kernel."""
        new = sorted(set(addresses) - self._places.keys())
        if new:
            tool = shutil.which("addr2line")
            if tool is None:
                self._places.update({address: (f"+0x{address}",) for address in new})
            else:
                command = [tool, "-a", "-i", "-f", "-C", "-e", self.path, *new]
                lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
                starts = [i for i, line in enumerate(lines) if line.startswith("0x")] + [len(lines)]
                for address, start, end in zip(new, starts[:-1], starts[1:], strict=True):
                    pairs = zip(lines[start + 1 : end : 2], lines[start + 2 : end : 2], strict=True)
                    self._places[address] = tuple(
                        f"{function} {Path(at.split(' ')[0]).name}" for function, at in pairs if "/csrc/simt/" not in at
                    )
        return [self._places[address] for address in addresses]

    def place(self, address: str) -> str:
        """Files and lines: "attention.cuh:101 < attention.cu:186"."""
        return " < ".join(frame.rsplit(" ", 1)[-1] for frame in self.places([address])[0] if ".cu" in frame)

    def error(self) -> str:
        """The sentence of the first broken rule since the last question; empty if there was none."""
        sentence = self.library.simt_take_error().decode()
        meetings = [line.split() for line in self.library.simt_take_meetings().decode().replace("@", "").splitlines()]
        sentence = re.sub(r"@{(\w+)}", lambda found: self.place(found[1]), sentence)
        if sentence == "" and meetings:
            pairs = [(one.strip("{}"), other.strip("{}")) for one, other in meetings]
            self.places([address for pair in pairs for address in pair])
            for one, other in pairs:
                if self.places([one]) != self.places([other]):
                    return f"lanes of a warp met at {self.place(one)} and at {self.place(other)}"
        return sentence

    def counters(self) -> list[dict[str, Any]]:
        """What was counted since the last question: one entry for each kernel and chain of places."""
        names = ("count", "wavefronts", "fewest_wavefronts", "sectors", "fewest_sectors", "read", "written")
        lines = [line.split("\t") for line in self.library.simt_take_counters().decode().splitlines()]
        addresses = [line[1][2:-1] for line in lines]
        total: dict[tuple[str, str, str], dict[str, int]] = {}
        self.places(addresses)
        for (kernel, _, instruction, *numbers), address in zip(lines, addresses, strict=True):
            entry = total.setdefault((kernel, instruction, self.place(address)), dict.fromkeys(names, 0))
            for name, number in zip(names, numbers, strict=True):
                entry[name] += int(number)
        return [
            {"kernel": kernel, "instruction": instruction, "place": place, **numbers}
            for (kernel, instruction, place), numbers in total.items()
        ]

    def bytes(self) -> dict[str, tuple[int, int]]:
        """What kernels have read and written since the last question, by the name of the memory."""
        lines = [line.split("\t") for line in self.library.simt_take_bytes().decode().splitlines()]
        return {name: (int(read), int(written)) for name, read, written in lines}

    @contextlib.contextmanager
    def memory(self, *, writable: bool = False, **tensors: Tensor) -> Iterator[None]:
        """Within the block kernels may read these tensors' storages, and write them where `writable`."""
        storages = {name: t.untyped_storage() for name, t in tensors.items() if t.numel()}
        for name, storage in storages.items():
            self.library.simt_register(storage.data_ptr(), storage.nbytes(), int(writable), name.encode())
        try:
            yield
        finally:
            for storage in storages.values():
                self.library.simt_forget(storage.data_ptr())

    def call(self, function: str, *arguments: Tensor | int) -> None:
        """Calls an exported function; tensors are its pointers."""
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in arguments]
        getattr(self.library, function)(*values)

    def run(self, function: str, *arguments: Tensor | int, outputs: int = 1) -> str:
        """The same with the tensors as memory, of which the last `outputs` may be written; returns the error."""
        tensors = {f"argument {i}": a for i, a in enumerate(arguments) if isinstance(a, Tensor)}
        written = {name: tensors.pop(name) for name in list(tensors)[len(tensors) - outputs :]}
        with self.memory(**tensors), self.memory(writable=True, **written):
            self.call(function, *arguments)
        return self.error()


class Operators(Machine):
    """Every operator of llmkern whose CUDA binding is in the library, on CPU tensors."""

    def __init__(self, path: Path, namespace: str = "llmkern_simt") -> None:
        super().__init__(path)
        # The bindings register kernels for this namespace; the schemas are those of the operators themselves.
        self._namespace = torch.library.Library(namespace, "FRAGMENT")
        for op in dispatch.ops():
            schema = str(getattr(torch.ops.llmkern, op).default._schema)
            self._namespace.define(schema.removeprefix("llmkern::"))
        torch.ops.load_library(path)

    def attempt(self, op: str, arguments: dict[str, Any]) -> tuple[str, Any]:
        """The sentence of the first broken rule, empty if there was none, and the operator's result."""
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        try:
            with self.memory(**tensors):
                result = getattr(getattr(torch.ops, self._namespace.ns), op).default(**arguments)
        finally:
            error = self.error()
            self.library.simt_forget_all()
        return error, result

    def op(self, op: str, arguments: dict[str, Any]) -> Any:
        """The operator's result; a broken rule raises AssertionError with the machine's sentence."""
        error, result = self.attempt(op, arguments)
        assert error == "", error
        return result
