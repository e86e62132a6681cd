from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

import pytest
from instruction_sets import on


@pytest.fixture
def isa(request: pytest.FixtureRequest):
    """The library set to one instruction set; back to the one before at the end."""
    try:
        with on(request.param):
            yield request.param
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def tool() -> Callable[..., str]:
    """Runs a command and returns what it printed."""

    def run(*command: str) -> str:
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed")
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    return run
