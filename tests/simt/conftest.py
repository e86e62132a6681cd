from __future__ import annotations

import pytest
from machine import ROOT, Machine, Operators, Unavailable, build
from planted import build_operators


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
        return build_operators()
    except Unavailable as why:
        pytest.skip(str(why))
