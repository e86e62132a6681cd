"""`make wheel`: what a wheel is tagged, and which ones are refused."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "llmkern/_ops.abi3.so"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("wheel_tool", ROOT / "tools" / "wheel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(folder: Path, tag: str, *members: str, size: int = 1) -> Path:
    path = folder / f"llmkern-0.1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member in members:
            wheel.writestr(member, bytes(size))
    return path


@pytest.mark.parametrize(
    ("tag", "members", "size", "said"),
    [
        ("py3-none-manylinux_2_34_x86_64", (LIBRARY,), 1, None),
        ("py3-none-manylinux_2_34_aarch64", (LIBRARY,), 1, None),
        ("py3-none-linux_x86_64", (LIBRARY,), 1, None),
        ("py3-none-linux_x86_64", (LIBRARY,), 30 * 2**20, "has 30.0 MiB, at most 30 are wanted"),
        ("py3-none-linux_x86_64", ("llmkern/_build.json",), 1, "has no native library"),
        ("cp311-cp311-linux_x86_64", (LIBRARY,), 1, "is tagged cp311-cp311-linux_x86_64, expected py3-none"),
        ("py3-none-any", (LIBRARY,), 1, "is tagged py3-none-any, expected py3-none and a platform"),
        ("py3-none-linux_x86_64", (LIBRARY, "llmkern.libs/libtorch.so"), 1, "libraries of its own: llmkern.libs/lib"),
    ],
)
def test_what_may_not_be_published_says_why(tool, tmp_path: Path, tag: str, members: tuple, size: int, said) -> None:
    why = tool.fault(make(tmp_path, tag, *members, size=size))
    assert (why is None) if said is None else (said in why)


def test_setuptools_tags_it_for_any_python_and_this_platform(tool, tmp_path: Path) -> None:
    """Without a library, which would take minutes; the refusal of that is the tool's last word."""
    source = tmp_path / "source"
    for folder in ("csrc", "llmkern"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / file, source / file)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    run = subprocess.run(command, cwd=source, env=os.environ | {"LLMKERN_BUILD": "0"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert "has no native library" in tool.fault(wheel)
