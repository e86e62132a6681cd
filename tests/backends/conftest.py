from __future__ import annotations

import pytest

from llmkern import _native


@pytest.fixture
def isa(request: pytest.FixtureRequest):
    """The library set to one instruction set; back to the one before at the end."""
    before = _native.cpu_isa()
    try:
        _native.set_cpu_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _native.set_cpu_isa(before)
