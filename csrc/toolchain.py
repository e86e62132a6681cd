"""Where compilers and ninja are, and build.ninja's lines: for setup.py, and for tests that compile kernels."""

import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import site
import sys
from pathlib import Path

CSRC = Path(__file__).parent.resolve()
ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the oldest torch that the library loads into: 2.11
RULES = "rule compile\n command = $tool -MD -MF $out.d -c $in -o $out\n depfile = $out.d\n deps = gcc\n"
RULES += "rule link\n command = $tool -o $out $in $libraries\n"


# What is installed where the library will run: in a build that pip isolates these are not on sys.path.
SITES = site.getsitepackages()


class Unavailable(Exception):
    """A part cannot be built; the message is the sentence that users are shown."""


def find_compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    if found := next(filter(None, map(shutil.which, names)), None):
        return found
    raise Unavailable(f"no C++ compiler was found (looked for {', '.join(names)}; CXX can name another)")


def find_ninja() -> str:
    beside = os.path.dirname(sys.executable)  # where the ninja wheel puts it, in an environment not activated
    if found := shutil.which("ninja") or shutil.which("ninja", path=beside):
        return found
    raise Unavailable("ninja was not found; pip install ninja")


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU: by its device files, so that neither torch nor a driver is loaded."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()  # the latter: WSL's


def find_nvcc() -> tuple[str | None, str | None]:
    """nvcc, or None and the sentence why there will be no CUDA part."""
    if os.environ.get("LLMKERN_CUDA") == "0":
        return None, "LLMKERN_CUDA=0 was set while building"
    if not any(CSRC.glob("cuda/*.cu")):
        return None, "there are no CUDA kernels in csrc/cuda"
    wheels = [str(folder) for path in [*sys.path, *SITES] for folder in Path(path).glob("nvidia/*/bin")]
    folders = [os.environ.get("CUDA_HOME", "") + "/bin", os.environ.get("PATH", ""), "/usr/local/cuda/bin", *wheels]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    return found, None if found else "nvcc was not found in CUDA_HOME, PATH, /usr/local/cuda or NVIDIA's wheels"


def folder_of(package: str) -> Path:
    """Where a Python package is, found without importing it."""
    spec = importlib.util.find_spec(package) or importlib.machinery.PathFinder.find_spec(package, SITES)
    if spec is None:
        raise Unavailable(f"{package} was not found while building; install it, and build with --no-build-isolation")
    return Path(spec.origin).parent


def build(text: list[str], rule: str, output: Path, inputs: list[Path], tool: list[str], libraries: str = "") -> Path:
    into, *sources = [str(path).replace(" ", "$ ").replace(":", "$:") for path in (output, *inputs)]
    text += [f"build {into}: {rule} {' '.join(sources)}\n description = {output.name}\n"]
    text += [f" tool = {shlex.join(tool)}\n libraries = {libraries}\n"]
    return output
