"""csrc/cpu's kernels compiled for Arm, and the emulated CPUs that execute them.

The bindings run in this process, where they are a copy of the operators, llmkern_arm; qemu executes the launchers
(guest.cpp), on tensors in memory that it shares with this process (host.cpp).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

from llmkern import dispatch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402

HERE = Path(__file__).parent
FOLDER = ROOT / "build" / "arm"
PREFIX = "aarch64-linux-gnu-"
NAMESPACE = "llmkern_arm"
SHARED_BYTES = 1 << 30  # reserved; what is not used takes no memory
CPUS = {"cortex-a53": "portable", "cortex-a76": "neon_dotprod", "max": "neon_i8mm"}
"""CPUs by qemu's names, and the instruction set that is the best one for each."""


class Missing(Exception):
    """The kernels cannot be executed here; the message is the sentence that a skipped test shows."""


def tool(*names: str) -> str:
    """The first of these programs that is installed."""
    if found := next(filter(None, map(shutil.which, names)), None):
        return found
    raise Missing(f"{names[0]} is not installed; apt-get install g++-aarch64-linux-gnu qemu-user")


def setup_py() -> dict[str, Any]:
    """What setup.py defines, without a build."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path(str(ROOT / "setup.py"))


def build() -> tuple[Path, Path]:
    """The program for qemu and the library for this process; ninja compiles what has changed."""
    if platform.machine() != "x86_64":
        raise Missing(f"the emulated CPUs share memory with x86-64 only, and this is {platform.machine()}")
    compiler, setup = tool(f"{PREFIX}g++"), setup_py()
    tool("qemu-aarch64", "qemu-aarch64-static")
    try:
        torch_folder, host_compiler = toolchain.folder_of("torch"), toolchain.find_compiler()
        ninja = toolchain.find_ninja()
    except toolchain.Unavailable as why:
        raise Missing(str(why)) from None
    text = [f"builddir = {FOLDER}\n", toolchain.RULES]
    program, library = FOLDER / "guest", FOLDER / "host.so"

    cross = [compiler, *setup["COMMON"], *setup["WARN"]]
    kernels = setup["compile_kernels"](text, cross, "aarch64", FOLDER / "kernels")
    guest = toolchain.build(text, "compile", FOLDER / "guest.o", [HERE / "guest.cpp"], cross)
    toolchain.build(text, "link", program, [guest, *kernels], [compiler, "-static"])

    include = ["-isystem", str(torch_folder / "include")]
    native = [host_compiler, "-std=c++20", "-O0", "-fPIC", f"-I{ROOT / 'csrc' / 'include'}", *include]
    bindings = [*native, toolchain.ABI, f"-DLLMKERN_NAMESPACE={NAMESPACE}"]
    objects = [toolchain.build(text, "compile", FOLDER / "host.o", [HERE / "host.cpp"], native)]
    for pattern in ("bindings/*.cpp", "bindings/cpu/*.cpp"):
        objects += setup["compile_all"](text, pattern, bindings, folder=FOLDER)
    objects += setup["compile_all"](text, "cpu/layers/*.cpp", native, folder=FOLDER)
    # Gradients are not called in the guest, which has no launchers for them.
    objects = [each for each in objects if "_backward" not in str(each)]
    link = [host_compiler, "-shared", "-Wl,--wrap=aligned_alloc", "-Wl,--wrap=free", "-Wl,-z,defs"]
    link += [f"-L{torch_folder / 'lib'}"]
    toolchain.build(text, "link", library, objects, link, "-ltorch -ltorch_cpu -lc10")

    FOLDER.mkdir(parents=True, exist_ok=True)
    script = FOLDER / "build.ninja"
    with (FOLDER / "lock").open("w") as lock:  # pytest's workers build the same
        fcntl.flock(lock, fcntl.LOCK_EX)
        script.write_text("".join(text))
        run = subprocess.run([ninja, "-f", script], capture_output=True, text=True)
    if run.returncode != 0:
        raise AssertionError(f"the kernels did not compile for Arm:\n{run.stdout}")
    return program, library


class Emulator:
    """The operators, each call carried out by one of `CPUS`."""

    def __init__(self, program: Path, library: Path) -> None:
        self._program, self._cpu = program, ""
        self._guests: dict[str, subprocess.Popen[bytes]] = {}
        self._operators = torch.library.Library(NAMESPACE, "FRAGMENT")
        for op in dispatch.ops():
            schema = str(getattr(torch.ops.llmkern, op).default._schema)
            self._operators.define(schema.removeprefix("llmkern::"))
        torch.ops.load_library(library)
        self._host = ctypes.CDLL(str(library))
        self._host.arm_isa.restype = ctypes.c_char_p
        self._memory = os.memfd_create("llmkern-arm")
        os.truncate(self._memory, SHARED_BYTES)
        assert self._host.arm_open(self._memory, ctypes.c_size_t(SHARED_BYTES)) == 0

    @contextlib.contextmanager
    def memory(self) -> Iterator[None]:
        """Within the block new tensors are where the emulated CPUs see them."""
        self._host.arm_share(1)
        try:
            yield
        finally:
            self._host.arm_share(0)

    def use(self, cpu: str) -> None:
        """Have `cpu` carry out the calls from now on."""
        guest = self._guests.get(cpu)
        if guest is None:
            qemu = tool("qemu-aarch64", "qemu-aarch64-static")
            command = [qemu, "-cpu", cpu, str(self._program), str(self._memory), str(SHARED_BYTES)]
            pipe = subprocess.PIPE
            guest = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, pass_fds=[self._memory], bufsize=0)
            self._guests[cpu] = guest
        self._cpu = cpu
        self._host.arm_connect(guest.stdin.fileno(), guest.stdout.fileno())

    def isa(self) -> str:
        """The instruction set in use."""
        return self._host.arm_isa().decode()

    def set_isa(self, name: str) -> bool:
        """Have the kernels use an instruction set; False where the CPU lacks it."""
        return self._host.arm_set_isa(name.encode()) == 0

    def op(self, op: str, call: dict[str, Any]) -> Any:
        """The operator's result; the call's tensors were made within `memory`.

        A kernel that reads elsewhere, or has an instruction that the CPU lacks, raises AssertionError with the place.
        """
        try:
            with self.memory():
                return getattr(getattr(torch.ops, NAMESPACE), op).default(**call)
        except RuntimeError as error:
            if "the emulated CPU has stopped" not in str(error):
                raise
            said = self._guests.pop(self._cpu).communicate()[1].decode().strip()
            raise AssertionError(f"{self._cpu} has stopped: {said}") from None

    def close(self) -> None:
        """End the emulated CPUs."""
        for guest in self._guests.values():
            guest.communicate()
