"""What every test may rely on: the environment that the suite started with, and a console of one width."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ["COLUMNS"] = "160"  # rich and argparse wrap to it, in this process and in those that tests start


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Give back what a test, or a library that it calls, has set: PEFT leaves CXX=gcc behind when BOFT's kernel does
    not compile, and with another compiler the SIMT machine would be built a second time."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})
