"""README, CONTRIBUTING and CHANGELOG are true: what they name exists, what they show runs, figures were measured."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llmkern
from llmkern import cli, config, dispatch
from llmkern.testing.case import ops_with_cases

ROOT = Path(__file__).resolve().parents[1]
README, CONTRIBUTING, CHANGELOG, ARCHITECTURE = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "ARCHITECTURE.md")
)
FIGURES = re.compile(r"<!-- figures: (\S+) -->\n(.*?)\n<!-- /figures -->", re.DOTALL)


def blocks(text: str) -> list[str]:
    """The Python code blocks."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def files_shown() -> dict[str, str]:
    """CONTRIBUTING's blocks that begin with a path: its files."""
    shown = {}
    for block in blocks(CONTRIBUTING):
        first, _, rest = block.partition("\n")
        if match := re.fullmatch(r"# (llmkern/\S+\.py)", first):
            shown[match[1]] = rest
    return shown


@pytest.mark.parametrize("text", [README, CONTRIBUTING, ARCHITECTURE], ids=["README", "CONTRIBUTING", "ARCHITECTURE"])
def test_files_that_are_named_exist(text: str) -> None:
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    named = set(re.findall(r"`((?:llmkern|csrc|tests|tools|benchmarks)/[^`\s]*\.\w+)`", prose))
    named |= set(re.findall(r"\]\(([\w/.-]+)\)", prose))
    assert named
    example = {"tests/ops/test_relu_squared.py"}
    # <op> is any op: rope has a file of its own in every layer, and layers a binding that only the CPU has.
    stands_for = ("rope", "layers")
    missing = [
        name for name in named - example if not any((ROOT / name.replace("<op>", op)).exists() for op in stands_for)
    ]
    assert not missing


def test_the_map_has_every_room() -> None:
    rooms = {path.name for path in (ROOT / "llmkern").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {room for room in rooms if f"`llmkern/{room}/`" not in ARCHITECTURE} == set()


def test_commands_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", README.split("## In your own code")[0])) - {"git"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    named = re.findall(r"^    llmkern (\w+)", README, re.MULTILINE)
    assert set(named) == set(cli.COMMANDS)


@pytest.mark.parametrize("line", re.findall(r"^    llmkern (why .*)", README, re.MULTILINE))
def test_command_lines_run(line: str) -> None:
    assert cli.run(line.split("#")[0].split()) == 0


def test_environment_variables_that_are_named_exist() -> None:
    documented = set(re.findall(r"^(LLMKERN_\w+) ", config.__doc__, re.MULTILINE))
    for text in (README, CONTRIBUTING, CHANGELOG):
        assert set(re.findall(r"LLMKERN_\w+", text)) <= documented
    read = set(re.findall(r"LLMKERN_\w+", Path(config.__file__).read_text().split('"""')[2]))
    assert read <= documented


def test_the_changelog_names_every_op_and_function() -> None:
    named = set(re.findall(r"`(\w+)`", CHANGELOG))
    assert set(ops_with_cases()) <= named
    assert {name for name in llmkern.__all__ if name[0].islower()} - {"ops", "nn", "use_backend"} <= named


def test_the_readmes_python_runs(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)  # it saves a model
    torch.manual_seed(0)
    configuration = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(configuration).eval()
    inputs = {"input_ids": torch.randint(0, 64, (1, 8))}
    scope = {"model": model, "original": copy.deepcopy(model), "inputs": inputs}
    shown = blocks(README)
    assert len(shown) == 3
    for block in shown:
        exec(compile(block, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "within the rule" in printed
    assert "left alone" in printed


def test_the_readmes_figures_are_the_committed_ones() -> None:
    ((path, table),) = FIGURES.findall(README)
    measured = json.loads((ROOT / path).read_text(encoding="utf-8"))
    result = measured["result"]
    assert measured["command"] in README
    assert measured["environment"]["hardware"]["cpu"] in README
    perplexity = result["perplexity"]
    expected = {
        "modules swapped": str(len(result["swapped"])),
        "largest logit difference": f"{result['accuracy']['max_abs']:.2e}",
        "top-1 agreement": f"{result['accuracy']['top1']:.2%}",
        "perplexity, original": f"{perplexity['original']:.3f}",
        "perplexity, optimized": f"{perplexity['optimized']:.3f}",
        "perplexity, int8": f"{perplexity['int8']:.3f}",
        "restored bit-equal": "yes" if result["restored_bit_equal"] else "no",
    }
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", table, re.MULTILINE))
    assert {name: value for name, value in rows.items() if name in expected} == expected
    assert result["verdict"]


class TestContributing:
    """The walk-through, followed to the letter in a copy of the package."""

    @pytest.fixture(scope="class")
    def followed(self, tmp_path_factory) -> Path:
        root = tmp_path_factory.mktemp("checkout")
        unwanted = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
        shutil.copytree(ROOT / "llmkern", root / "llmkern", ignore=unwanted)
        shutil.copytree(ROOT / "tests" / "ops", root / "tests" / "ops", ignore=unwanted)
        shutil.copytree(ROOT / "tools", root / "tools", ignore=unwanted)
        for name in ("README.md", "pyproject.toml"):
            shutil.copy(ROOT / name, root)
        for name, text in files_shown().items():
            file = root / name
            assert not file.exists(), f"{name} is no example any more: it exists"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
        return root

    def run(self, root: Path, *arguments: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=600
        )

    def test_has_a_file_in_every_layer(self) -> None:
        op, backend = "relu_squared", "example"
        assert set(files_shown()) == {
            *[f"llmkern/{layer}/{op}.py" for layer in ("ops", "backends/reference", "backends/torch", "why")],
            f"llmkern/testing/cases/{op}.py",
            f"llmkern/bench/ops/{op}.py",
            f"llmkern/backends/{backend}/__init__.py",
            f"llmkern/backends/{backend}/{op}.py",
        }
        assert op not in dispatch.ops()

    def test_the_new_op_keeps_the_contract(self, followed) -> None:
        done = self.run(followed, "-m", "pytest", "tests/ops/test_contract.py", "-k", "relu_squared", "-p", "no:xdist")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        assert re.search(r"\d{2,} passed", done.stdout), done.stdout[-500:]

    def test_the_command_line_and_the_table_know_it(self, followed) -> None:
        done = self.run(followed, "-m", "llmkern", "why", "relu_squared", "--shape", "4,8", "--json")
        rows = {row["backend"]: row["outcome"] for row in json.loads(done.stdout)["rows"]}
        assert (rows["torch"], rows["example"]) == ("chosen", "able")
        done = self.run(followed, "tools/generate.py")
        assert done.returncode == 0, done.stderr
        (row,) = [line for line in (followed / "README.md").read_text().splitlines() if "`relu_squared`" in line]
        assert "CPU fp32" in row

    def test_the_new_op_is_measured(self, followed) -> None:
        command = ["-m", "llmkern", "bench", "ops", "--op", "relu_squared", "--shape", "4,8", "--quick"]
        done = self.run(followed, *command, "--device", "cpu", "--dtype", "float32", "--json", "-")
        rows = json.loads(done.stdout)["rows"]
        assert {(row["provider"], row["x"]["mode"]) for row in rows} >= {("llmkern", "forward"), ("torch", "backward")}
        assert all(row["p50"] for row in rows if row["provider"] == "llmkern"), rows

    def test_the_family_has_the_program_that_is_shown(self, followed) -> None:
        script, shown = re.search(
            r"```python\n([^`]*layer_program[^`]*)```\n\n```\n(.*?)\n```", CONTRIBUTING, re.DOTALL
        ).groups()
        done = self.run(followed, "-c", script)
        assert done.stdout.strip() == shown, done.stderr
        families = (ROOT / "tests/swap/families.py").read_text() + (ROOT / "tests/integrations/zoo.py").read_text()
        assert "Arcee" not in families

    def test_the_backend_from_outside_runs(self, followed) -> None:
        (script,) = [block for block in blocks(CONTRIBUTING) if "llmkern.register" in block]
        done = self.run(followed, "-c", script)
        assert done.returncode == 0, done.stderr
