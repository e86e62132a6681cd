"""Building the native library: the reasons that a build leaves, and what an edited header recompiles."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmkern import _native

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build needs."""
    copy = tmp_path / "a source"  # with a space, as people have them
    for folder in ("csrc", "llmkern"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / file, copy / file)
    return copy


def build(source: Path, **env: str) -> dict[str, str | None]:
    """Runs the build, without its CUDA part, which takes minutes; it must succeed.  The reasons that it leaves."""
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source,
        env=os.environ | {"LLMKERN_CUDA": "0"} | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads((source / "llmkern" / "_build.json").read_text())


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"CXX": "/nonexistent/g++"}, "no C++ compiler was found (looked for /nonexistent/g++; CXX can name another)"),
        ({"LLMKERN_BUILD": "0"}, "LLMKERN_BUILD=0 was set while building"),
        ({"CXX": shutil.which("false") or ""}, "it did not compile: "),
    ],
    ids=["no-compiler", "not-wanted", "failing-compiler"],
)
def test_a_build_that_cannot_be_says_why(source: Path, env: dict[str, str], reason: str) -> None:
    stale = source / "llmkern" / "_ops.abi3.so"
    stale.write_text("an older library")
    reasons = build(source, **env)
    assert reasons["library"] is not None
    assert reasons["library"].startswith(reason)
    assert not stale.exists()
    told = "import sys; sys.path.insert(0, '.'); from llmkern import _native; print(_native.reason())"
    run = subprocess.run([sys.executable, "-c", told], cwd=source, capture_output=True, text=True, timeout=120)
    assert f"the native library was not built: {reasons['library']}" in run.stdout


def test_torch_is_found_from_a_build_that_pip_isolates() -> None:
    """There sys.path is without the environment that the package is installed into."""
    code = "import sys; sys.path[:] = [p for p in sys.path if 'packages' not in p]; sys.path.append('csrc')\n"
    code += "import toolchain; print(toolchain.folder_of('torch'))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert Path(run.stdout.strip()).samefile(Path(torch.__file__).parent)


@pytest.mark.parametrize(
    ("name", "accepted"),
    [("LLMKERN_BUILD", "0 or 1"), ("LLMKERN_CUDA", "0 or 1 or auto or nvcc"), ("LLMKERN_SANITIZE", "0 or 1")],
)
def test_settings_that_are_not_accepted_end_the_build(source: Path, name: str, accepted: str) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    run = subprocess.run(
        command, cwd=source, env=os.environ | {name: "yes"}, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == f"llmkern: {name} is 'yes', expected {accepted}"


# ninja asks a compiler which headers a file includes; for that the preprocessor is enough, and a hundred times as fast.
PREPROCESSOR = """#!/bin/sh
case " $* " in
  *" -c "*) exec {compiler} -E "$@" ;;
esac
while [ "$1" != -o ]; do shift; done
: > "$2"
"""


@pytest.mark.skipif(_native.reason() is not None, reason=str(_native.reason()))
def test_an_edited_header_recompiles_its_users_and_nothing_else(source: Path, tool, tmp_path: Path) -> None:
    """ninja's own plan, after a build: nothing to do, then exactly the objects that include vec.h: every kernel's."""
    compiler = tmp_path / "preprocess"
    compiler.write_text(PREPROCESSOR.format(compiler=toolchain.find_compiler()))
    compiler.chmod(0o755)
    assert build(source, CXX=str(compiler))["library"] is None

    def plan() -> list[str]:
        script = source / "build" / "native" / "library.ninja"
        return re.findall(r"\] (\S+)", tool("ninja", "-n", "-f", str(script)))

    assert plan() == []
    header = source / "csrc" / "cpu" / "vec.h"
    header.write_text(header.read_text() + "\n")
    kernels = [path for path in (source / "csrc" / "cpu").glob("*.cpp") if path.name != "isa.cpp"]
    expected = {f"{path.name}.{isa}.o" for path in kernels for isa in ("portable", "avx2", "avx512")}
    products = (source / "csrc" / "cpu" / "products").glob("*.cpp")
    expected |= {f"{path.name}.{isa}.o" for path in products for isa in _native.CPU_ISAS}
    assert set(plan()) == expected | {"_ops.abi3.so"}
