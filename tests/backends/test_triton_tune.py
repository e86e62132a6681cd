"""The tables of tile sizes: which entry a launch takes, and what `llmkern tune` writes, timed by a fake."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from llmkern.backends.triton import _configs, _tune, installed
from llmkern.backends.triton._configs import DEFAULTS, config
from llmkern.backends.triton._launch import Target
from llmkern.config import settings

TARGET = Target("sm90", 132, "NVIDIA H100 80GB HBM3")
pytestmark = pytest.mark.skipif(not installed(), reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(settings, "cache", str(tmp_path))
    _configs.forget()
    yield
    _configs.forget()


class OutOfResources(Exception):
    """As Triton's own is called."""


def test_every_class_has_an_entry_for_any_architecture() -> None:
    for op, table in DEFAULTS.items():
        for shape_class, entry in table.items():
            assert {"*", "cpu"} <= set(entry), f"{op} {shape_class}"
            assert len({frozenset(chosen) for chosen in entry.values()}) == 1, f"{op} {shape_class}: different names"


def test_an_entry_of_the_architecture_comes_before_the_general_one() -> None:
    table = DEFAULTS["int8_matmul"]["s8-many"]
    assert config("int8_matmul", "s8-many", TARGET) == table["sm90"]
    assert config("int8_matmul", "s8-many", Target("sm89", 72, "L4")) == table["*"]
    assert config("int8_matmul", "s8-many", Target("gfx90a", 104, "AMD Instinct MI250X")) == table["gfx"]
    assert config("rope", "any", Target("gfx942", 304, "AMD Instinct MI300X")) == DEFAULTS["rope"]["any"]["*"]


@pytest.mark.parametrize("op", DEFAULTS)
def test_the_fastest_is_kept_and_used(op: str) -> None:
    best, seen = _tune.candidates(op)[-1], []

    def timer(call) -> float:
        shape_class = _configs.classes(op)[len(seen)]
        chosen = config(op, shape_class, TARGET)
        if chosen.get("num_warps") == 4 and chosen != best:
            raise OutOfResources
        return 1.0 if chosen == best else 2.0

    for tuned in _tune.tune(op, TARGET, "meta", timer):
        seen.append(tuned)
        assert (tuned.best, tuned.best_time) == (best, 1.0)
    path = _configs.tuned_path(TARGET)
    versions = [f"{package}-{importlib.metadata.version(package)}" for package in ("triton", "llmkern")]
    assert path.name == "_".join(["nvidia-h100-80gb-hbm3", *versions]) + ".json"
    assert json.loads(path.read_text()) == {op: dict.fromkeys(_configs.classes(op), best)}
    for shape_class in _configs.classes(op):
        assert config(op, shape_class, TARGET) == best


def test_the_table_stays_where_nothing_is_faster() -> None:
    for tuned in _tune.tune("rope", TARGET, "meta", lambda call: 1.0):
        assert tuned.best == tuned.before == DEFAULTS["rope"]["any"]["*"]


def test_an_error_that_is_not_of_size_is_not_hidden() -> None:
    def broken(call) -> float:
        raise RuntimeError("the kernel is wrong")

    with pytest.raises(RuntimeError, match="the kernel is wrong"):
        next(_tune.tune("rope", TARGET, "meta", broken))


def test_ops_without_configurations_are_named() -> None:
    with pytest.raises(ValueError, match="'swiglu' has no configurations to tune; these have: int8_matmul, attention"):
        next(_tune.tune("swiglu", TARGET, "meta", lambda call: 1.0))
