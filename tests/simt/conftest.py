from __future__ import annotations

import pytest
from machine import ROOT, Machine, Operators, Unavailable, build, torch_flags


@pytest.fixture(scope="session")
def instructions() -> Machine:
    """The kernels of instructions.cu."""
    try:
        return Machine(build("instructions", [ROOT / "tests" / "simt" / "instructions.cu"]))
    except Unavailable as why:
        pytest.skip(str(why))


@pytest.fixture(scope="session")
def operators() -> Operators:
    """csrc/cuda and its bindings."""
    try:
        sources = [*sorted((ROOT / "csrc").glob("cuda/*.cu")), *sorted((ROOT / "csrc").glob("bindings/*.cpp"))]
        return Operators(build("operators", sources, torch_flags(), ["-ltorch", "-ltorch_cpu"]))
    except Unavailable as why:
        pytest.skip(str(why))
