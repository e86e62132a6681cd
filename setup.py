"""Builds the native library: writes ninja files, runs ninja, and says why whatever is missing is missing.

llmkern/_ops.abi3.so has the kernels, on torch's stable ABI; llmkern/_C*.so tells how they were built; in
llmkern/_build.json each part has null where it was built, else the sentence why not, and the signatures of the ops
that it was built for have a digest.  The package works without them,
so a machine without a compiler installs all the same.  llmkern/config.py describes the LLMKERN_* variables read here.
"""

import json
import os
import platform
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # an older setuptools: it can build in place all the same
    bdist_wheel = object

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))
from toolchain import (  # noqa: E402
    ABI,
    CSRC,
    RULES,
    Unavailable,
    build,
    find_compiler,
    find_ninja,
    find_nvcc,
    folder_of,
    has_gpu,
)

SANITIZE = os.environ.get("LLMKERN_SANITIZE") == "1"
OBJECTS = ROOT / "build" / ("sanitize" if SANITIZE else "native")
COMMON = ["-O3", "-std=c++20", f"-I{CSRC / 'include'}"]
HOST = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
# An error ends the process; vptr would want the classes of torch's own library.
CHECKS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
HOST += CHECKS if SANITIZE else []
WARN = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"]  # the last: gcc 12's own immintrin.h
KERNEL = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]  # NaN and infinity stay what IEEE makes them


def isas(machine: str) -> dict[str, list[str]]:
    """The instruction sets of a machine (`platform.machine()`), and the flags of the copy of the kernels for each.

    Each csrc/cpu file is compiled once per set (csrc/cpu/isa.h); the best one is chosen at run time.
    """
    sets = {"portable": ["-DLLMKERN_ISA_LEVEL=0", "-DLLMKERN_PORTABLE"]}
    if machine in ("x86_64", "AMD64"):
        sets["avx2"] = ["-DLLMKERN_ISA_LEVEL=1", "-march=x86-64-v3"]
        sets["avx2_vnni"] = [*sets["avx2"], "-mavxvnni"]
        sets["avx512"] = ["-DLLMKERN_ISA_LEVEL=2", "-march=x86-64-v4", "-mprefer-vector-width=512"]
        sets["avx512_vnni"] = [*sets["avx512"], "-mavx512vnni"]
        sets["avx512_bf16"] = [*sets["avx512_vnni"], "-mavx512bf16"]
        sets["amx"] = [*sets["avx512_bf16"], "-mamx-tile", "-mamx-int8", "-mamx-bf16"]
    elif machine in ("aarch64", "arm64"):
        sets["neon_dotprod"] = ["-DLLMKERN_ISA_LEVEL=0", "-march=armv8.2-a+dotprod"]
        sets["neon_i8mm"] = ["-DLLMKERN_ISA_LEVEL=0", "-march=armv8.2-a+dotprod+i8mm+bf16"]
    return sets


# The files in csrc/cpu itself are not compiled for sets that only add products of integers, bf16 or matrices.
PRODUCTS = ("avx2_vnni", "avx512_vnni", "avx512_bf16", "amx", "neon_dotprod", "neon_i8mm")
ISAS = isas(platform.machine())
ARCHS = (os.environ.get("LLMKERN_CUDA_ARCHS") or "80;90a").split(";")


def compile_all(text: list[str], pattern: str, tool: list[str], tag: str = "", folder: Path = OBJECTS) -> list[Path]:
    sources = sorted(CSRC.glob(pattern))
    return [build(text, "compile", folder / f"{s.relative_to(CSRC)}{tag}.o", [s], tool) for s in sources]


def compile_kernels(text: list[str], host: list[str], machine: str, folder: Path = OBJECTS) -> list[Path]:
    """The CPU kernels for every instruction set of a machine, by the compiler and flags `host`."""
    objects = []
    for isa, flags in reversed(isas(machine).items()):
        tool = [*host, *KERNEL, *flags, f"-DLLMKERN_ISA={isa}"]
        patterns = ["cpu/products/*.cpp"] + ([] if isa in PRODUCTS else ["cpu/*.cpp"])
        objects += [made for pattern in patterns for made in compile_all(text, pattern, tool, f".{isa}", folder)]
    return objects


def library(text: list[str], output: Path, nvcc: str | None) -> None:
    compiler, torch = find_compiler(), folder_of("torch")
    host, stable = [compiler, *COMMON, *HOST, *WARN], ["-isystem", str(torch / "include"), ABI]
    # ninja starts files in this order: what takes longest comes first, so that no core waits for another at the end.
    link, objects = [compiler, *CHECKS] if SANITIZE else [compiler], []
    if nvcc:  # it compiles the CUDA bindings and links too: it alone knows where its headers and libraries are
        gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
        gencode += [f"-gencode=arch=compute_{ARCHS[0]},code=compute_{ARCHS[0]}"]  # PTX, for devices to come
        gencode += ["-Xfatbin=-compress-all"]  # a third of the size
        device = [nvcc, "-ccbin", compiler, "-Xcompiler", ",".join(HOST), *gencode, *COMMON]
        objects += compile_all(text, "cuda/*.cu", device)
        bindings = [*device, *stable, "-DUSE_CUDA", "-DLLMKERN_CUDA"]
        objects += compile_all(text, "bindings/*.cpp", bindings, ".cuda")
        link = [nvcc, "-ccbin", compiler, "-cudart", "static"]
    objects += compile_kernels(text, host, platform.machine())
    objects += compile_all(text, "bindings/cpu/*.cpp", [*host, *stable])
    objects += compile_all(text, "bindings/*.cpp", [*host, *stable], ".cpu")
    objects += compile_all(text, "cpu/layers/*.cpp", host)
    link += ["-shared", f"-L{torch / 'lib'}", "-Xlinker", "--no-as-needed", "-Xlinker", "--exclude-libs=ALL"]
    build(text, "link", output, objects, link, "-ltorch -ltorch_cpu -Xlinker -z -Xlinker defs")


def introspection(text: list[str], output: Path, nvcc: str | None) -> None:
    facts = {"FLAGS": [*COMMON[:2], *KERNEL], "ISAS": ISAS, "NVCC": [nvcc or ""], "ARCHS": ARCHS if nvcc else []}
    folders = [folder_of("pybind11") / "include", folder_of("torch") / "include", sysconfig.get_path("include")]
    flags = [ABI, *(flag for folder in folders for flag in ("-isystem", str(folder)))]
    flags += [f"-DLLMKERN_{name}={json.dumps(' '.join(value))}" for name, value in facts.items()]
    objects = compile_all(text, "python/*.cpp", [find_compiler(), *COMMON, *HOST, *WARN, *flags])
    build(text, "link", output, objects, [find_compiler(), "-shared", *(CHECKS if SANITIZE else [])])


def make(part, output: Path, nvcc: str | None) -> str | None:
    """Bring `output` up to date; the sentence why it could not be built, or None.  A stale library never stays."""
    try:
        if os.environ.get("LLMKERN_BUILD") == "0":
            raise Unavailable("LLMKERN_BUILD=0 was set while building")
        ninja = find_ninja()
        script, log = OBJECTS / f"{part.__name__}.ninja", OBJECTS / f"{part.__name__}.log"
        part(text := [f"builddir = {OBJECTS / part.__name__}\n", RULES], output, nvcc)
        OBJECTS.mkdir(parents=True, exist_ok=True)
        script.write_text("".join(text))
        jobs = os.environ.get("MAX_JOBS")  # as for PyTorch's extensions; ninja's own default: the cores, and two more
        run = subprocess.run(
            [ninja, "-f", script, *(["-j", jobs] if jobs else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        log.write_text(run.stdout)
        print(run.stdout, end="")
        if run.returncode:
            first = next((s for s in run.stdout.splitlines() if "error:" in s or "fatal" in s), "ninja failed")
            raise Unavailable(f"it did not compile: {first.strip()} (more in {log})")
    except Unavailable as why:
        output.unlink(missing_ok=True)
        print(f"llmkern: {output.name} was not built: {why}", file=sys.stderr)
        return str(why)
    return None


CUDA = ("0", "1", "auto", "nvcc")  # llmkern/config.py says what each means


def cuda_part() -> tuple[str | None, str | None]:
    """nvcc, or None and the sentence why there will be no CUDA part, which takes longer to build than all the rest."""
    nvcc, why_not = find_nvcc()
    if nvcc and os.environ.get("LLMKERN_CUDA") in (None, "", "auto") and not has_gpu():
        return None, "no NVIDIA GPU was found on the machine that built it; LLMKERN_CUDA=1 builds it all the same"
    return nvcc, why_not


def check_settings() -> None:
    flag = ("0", "1")
    for name, accepted in (("LLMKERN_BUILD", flag), ("LLMKERN_CUDA", CUDA), ("LLMKERN_SANITIZE", flag)):
        value = os.environ.get(name)
        if value and value not in accepted:
            raise SystemExit(f"llmkern: {name} is {value!r}, expected {' or '.join(accepted)}")


class BuildNative(build_ext):
    def run(self) -> None:
        check_settings()
        package = ROOT / "llmkern" if self.inplace or self.editable_mode else Path(self.build_lib).resolve() / "llmkern"
        package.mkdir(parents=True, exist_ok=True)
        nvcc, no_cuda = cuda_part()
        no_library = make(library, package / "_ops.abi3.so", nvcc)
        if nvcc and no_library:  # better the CPU part alone than nothing
            nvcc, no_cuda = None, no_library
            no_library = make(library, package / "_ops.abi3.so", nvcc)
        if no_cuda and os.environ.get("LLMKERN_CUDA") == "1":
            raise SystemExit(f"llmkern: LLMKERN_CUDA=1, but {no_cuda}")
        no_info = make(introspection, package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", nvcc)
        built_for = runpy.run_path(str(ROOT / "llmkern" / "_signatures.py"))["signatures"](ROOT / "llmkern")
        reasons = {"library": no_library, "cuda": no_cuda, "_C": no_info, "signatures": built_for}
        (package / "_build.json").write_text(json.dumps(reasons))


class AnyPython(bdist_wheel):
    """The library knows nothing of Python; another Python than this one just goes without llmkern._C."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# The Extension has build_ext called and makes the wheel a platform's own; BuildNative finds the sources itself.
COMMANDS = {"build_ext": BuildNative, "bdist_wheel": AnyPython}
setuptools.setup(ext_modules=[setuptools.Extension("llmkern._ops", [])], cmdclass=COMMANDS)
