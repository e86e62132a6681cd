"""Each implementation names the file in which a reader finds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmkern import dispatch
from llmkern.kernel_files import IN_PYTHON

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("op", dispatch.ops())
def test_the_file_of_an_implementation_exists(op: str) -> None:
    for impl in dispatch.implementations(op):
        assert (ROOT / impl.source).is_file(), f"{op} on {impl.backend.name}: {impl.source!r}"
        native = impl.backend.name in ("cpu", "cuda") and (op, impl.backend.name) not in IN_PYTHON
        assert impl.source.startswith("csrc/") == native
