from __future__ import annotations

import pytest
from machine import ROOT, TORCH_LIBRARIES, Machine, Operators, Unavailable, build, torch_flags


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
        patterns = ("cuda/*.cu", "bindings/*.cpp", "bindings/cuda/*.cpp")
        sources = [source for pattern in patterns for source in sorted((ROOT / "csrc").glob(pattern))]
        return Operators(build("operators", sources, torch_flags(), TORCH_LIBRARIES))
    except Unavailable as why:
        pytest.skip(str(why))
