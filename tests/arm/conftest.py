from __future__ import annotations

from collections.abc import Iterator

import pytest
from emulator import Emulator, Missing, build


@pytest.fixture(scope="session")
def emulator() -> Iterator[Emulator]:
    """Arm's CPUs, with llmkern's operators on them."""
    try:
        program, library = build()
    except Missing as why:
        pytest.skip(str(why))
    made = Emulator(program, library)
    yield made
    made.close()
