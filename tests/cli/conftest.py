from __future__ import annotations

import pytest

from llmkern.cli import run
from llmkern.config import settings


@pytest.fixture(autouse=True)
def settings_come_back():
    before = dict(vars(settings))
    yield
    for name, value in before.items():
        setattr(settings, name, value)


@pytest.fixture
def llmkern_(capsys):
    """Run the command line; returns (exit status, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()  # what fixtures have printed
        status = run(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
