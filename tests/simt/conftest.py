from __future__ import annotations

import pytest
from machine import ROOT, Machine, Unavailable, build


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """The kernels of instructions.cu."""
    try:
        return Machine(build("instructions", [ROOT / "tests" / "simt" / "instructions.cu"]))
    except Unavailable as why:
        pytest.skip(str(why))
