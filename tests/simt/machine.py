"""csrc/cuda's kernels compiled for the SIMT machine of csrc/simt, and the machine's switches."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import re
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

FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-DLLMKERN_SIMT", "-Wall", "-Wextra"]
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


def build(name: str, sources: Sequence[Path], flags: Sequence[str] = (), libraries: Sequence[str] = ()) -> Path:
    """A shared library of the sources and the machine, under build/simt; ninja compiles what has changed."""
    compiler, headers = compiler_and_headers()
    folder = ROOT / "build" / "simt"
    includes = [f"-I{path}" for path in (ROOT / "csrc" / "include", ROOT / "csrc", ROOT / "csrc" / "cuda")]
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


class Machine:
    """One loaded library: `machine.library` has its functions, the rest its switches."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.simt_take_error.restype = ctypes.c_char_p
        self.library.simt_register.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p)
        self.library.simt_forget.argtypes = (ctypes.c_void_p,)
        self.library.simt_set.argtypes = (ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_int)

    def set(
        self,
        *,
        seed: int = 0,
        late_copies: bool = False,
        sm_count: int = 4,
        capability: tuple[int, int] = (9, 0),
    ) -> None:
        """Seed of all orders; whether asynchronous copies land only when they are waited for; the GPU's properties."""
        self.library.simt_set(seed, int(late_copies), sm_count, 10 * capability[0] + capability[1])

    def error(self) -> str:
        """The sentence of the first broken rule since the last question; empty if there was none."""
        return self.library.simt_take_error().decode()

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

    def op(self, op: str, arguments: dict[str, Any]) -> Any:
        """The operator's result; a broken rule raises AssertionError with the machine's sentence."""
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        try:
            with self.memory(**tensors):
                result = getattr(getattr(torch.ops, self._namespace.ns), op).default(**arguments)
        finally:
            error = self.error()
            self.library.simt_forget_all()
        assert error == "", error
        return result
