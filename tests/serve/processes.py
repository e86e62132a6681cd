"""`llmkern serve` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

__all__ = ["process"]


@contextmanager
def process(arguments: Sequence[str], prelude: str = "") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run it with these arguments, after the Python of `prelude`; yields the process and its address."""
    command = ["serve", *arguments, "--port", "0"]
    code = f"{prelude}\nfrom llmkern.cli import run\nimport sys\nsys.exit(run({command!r}))"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    started = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
    assert started.stderr is not None
    try:
        seen = ""
        for line in started.stderr:
            seen += line
            if " at http://127.0.0.1:" in line:
                yield started, line.split(" at ")[1].strip()
                break
        else:
            pytest.fail(f"the server did not start: {seen}")
    finally:
        started.kill()
        started.wait(30)
        started.stderr.close()
