from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "generate.py"


@pytest.fixture
def generate(tmp_path, monkeypatch):
    """The tool, working on copies of the files it writes."""
    spec = importlib.util.spec_from_file_location("generate", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    for name in ("STUB", "README", "BENCH_README"):
        copy = tmp_path / ("benchmarks" if name == "BENCH_README" else "") / getattr(module, name).name
        shutil.copy(getattr(module, name), copy)
        monkeypatch.setattr(module, name, copy)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_what_is_committed_is_what_the_registry_says() -> None:
    done = subprocess.run([sys.executable, TOOL, "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["STUB", "README", "BENCH_README"])
def test_a_stale_file_is_found_and_written(generate, name: str, capsys) -> None:
    path = getattr(generate, name)
    assert generate.main([]) == 0
    fresh = path.read_text(encoding="utf-8")
    stale = fresh.replace("layer_norm", "layer_nrom").replace("make bench", "make bnech")
    path.write_text(stale, encoding="utf-8")
    capsys.readouterr()
    assert generate.main(["--check"]) == 1
    shown = path.relative_to(generate.ROOT)
    assert capsys.readouterr().out == f"{shown} is stale: run `python tools/generate.py`\n"
    assert generate.main([]) == 0
    assert path.read_text(encoding="utf-8") == fresh
    assert generate.main(["--check"]) == 0


def test_a_readme_without_markers_is_left_alone(generate, capsys) -> None:
    generate.README.write_text("nothing here\n", encoding="utf-8")
    assert generate.main([]) == 1
    assert "README.md needs one line <!-- ops table: generated -->" in capsys.readouterr().err
    assert generate.README.read_text(encoding="utf-8") == "nothing here\n"


def test_the_table_names_every_op_and_backend(generate) -> None:
    header, _, *rows = generate.table().splitlines()
    assert [row.split("`")[1] for row in rows] == sorted(generate.ops.__all__)
    assert all(backend.name in header for backend in generate.dispatch.backends())
    (row,) = [row for row in rows if "`quantize_int8`" in row]
    assert "∇" not in row
