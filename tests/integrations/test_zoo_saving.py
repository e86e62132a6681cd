"""What is saved of an optimized model is what would be saved of the untouched one; llmkern is not needed to load it."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import ZOO, Entry

import llmkern

pytestmark = pytest.mark.filterwarnings("ignore:llmkern leaves:UserWarning")

every_entry = pytest.mark.parametrize("entry", ZOO, ids=str)


def optimized(entry: Entry) -> nn.Module:
    model = entry.build()
    assert llmkern.report(llmkern.optimize_(model)).swap.swapped
    return model


@torch.no_grad()
def same_output(entry: Entry, model: nn.Module, other: nn.Module) -> bool:
    inputs = entry.inputs()
    return torch.equal(entry.output(model(**inputs)), entry.output(other(**inputs)))


@every_entry
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_is_the_untouched_model(entry: Entry, protocol: int) -> None:
    untouched = entry.build()
    written = pickle.dumps(optimized(entry), protocol)
    assert b"llmkern" not in written
    loaded = pickle.loads(written)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in untouched.modules()]
    assert [list(vars(m)) for m in loaded.modules()] == [list(vars(m)) for m in untouched.modules()]
    if hasattr(untouched, "config"):
        assert loaded.config._attn_implementation == untouched.config._attn_implementation
        assert loaded.config.to_dict() == untouched.config.to_dict()
    assert same_output(entry, loaded, untouched)


@every_entry
def test_torch_save_writes_the_untouched_model(entry: Entry) -> None:
    written = io.BytesIO()
    torch.save(optimized(entry), written)
    assert b"llmkern" not in written.getvalue()
    written.seek(0)
    assert same_output(entry, torch.load(written, weights_only=False), entry.build())


@pytest.mark.parametrize("entry", [e for e in ZOO if e.kind != "plain"], ids=str)
def test_save_pretrained_writes_the_same_files(entry: Entry, tmp_path: Path) -> None:
    entry.build().save_pretrained(tmp_path / "untouched")
    model = optimized(entry)
    model.save_pretrained(tmp_path / "optimized")
    files = {path.name: path.read_bytes() for path in (tmp_path / "untouched").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "optimized").iterdir()} == files


def test_a_saved_model_loads_where_llmkern_is_not(tmp_path: Path) -> None:
    names = ("llama", "gpt2", "gpt_oss", "torch_prenorm")
    inputs = {}
    for entry in [e for e in ZOO if e.name in names]:
        torch.save(optimized(entry), tmp_path / f"{entry.name}.pt")
        with torch.no_grad():
            inputs[entry.name] = (entry.inputs(), entry.output(entry.build()(**entry.inputs())))
    torch.save(inputs, tmp_path / "inputs")
    program = """
import sys, torch
sys.modules["llmkern"] = None  # importing it is an error
for name, (inputs, expected) in torch.load("inputs").items():
    model = torch.load(f"{name}.pt", weights_only=False)
    with torch.no_grad():
        output = model(**inputs)
    assert torch.equal(getattr(output, "logits", output), expected), name
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
