"""A native library that was built for other signatures than the Python beside it is not called with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmkern import _native
from llmkern._signatures import signatures


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    library = _native.path()
    if _native.reason() is not None:
        pytest.skip(_native.reason() or "")
    shutil.copytree(Path(_native.__file__).parent / "ops", tmp_path / "ops")
    (tmp_path / "_ops.abi3.so").symlink_to(library)
    monkeypatch.setattr(_native, "_PACKAGE", tmp_path)
    monkeypatch.setattr(_native.settings, "library", None)
    return tmp_path


def test_a_stale_library_says_so_and_is_left(package: Path) -> None:
    (package / "_build.json").write_text(json.dumps({"library": None, "signatures": "of another day"}))
    with pytest.warns(RuntimeWarning, match="is stale: it was built for other signatures of the ops; build it with"):
        library, reason = _native._load()
    assert library is None
    assert "is stale" in str(reason)


@pytest.mark.parametrize("known", [True, False])
def test_a_library_of_this_day_is_loaded(package: Path, known: bool, recwarn) -> None:
    built_for = {"signatures": signatures(package)} if known else {}
    (package / "_build.json").write_text(json.dumps({"library": None, **built_for}))
    library, reason = _native._load()
    assert (library is not None, reason) == (True, None)
    assert not recwarn.list


def test_the_digest_is_of_signatures_alone(package: Path) -> None:
    before, file = signatures(package), package / "ops" / "gelu.py"
    text = file.read_text()
    file.write_text(text.replace('"""', '"""More words. ', 1))
    assert signatures(package) == before
    file.write_text(text.replace("gelu(Tensor x", "gelu(Tensor x, Tensor y", 1))
    assert signatures(package) != before
    assert signatures(package / "nowhere") is None
