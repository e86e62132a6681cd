"""`llmkern why`: the dispatcher's decision about a call that is only described."""

from __future__ import annotations

import json

import pytest
import torch

import llmkern
from llmkern import dispatch, registry
from llmkern.config import settings
from llmkern.testing.recorder import Recorder
from llmkern.why import ops, sizes, why

SIZES = {
    "B": 2,
    "Hq": 4,
    "Hkv": 2,
    "S": 8,
    "Sq": 8,
    "Skv": 64,
    "D": 32,
    "rows": 6,
    "hidden": 64,
    "words": 50,
    "M": 6,
    "N": 32,
    "K": 64,
    "heads": 4,
    "past": 5,
    "H": 64,
    "I": 96,
}


class TestWhy:
    def test_every_op_is_known(self) -> None:
        assert ops() == [op for op in dispatch.ops() if not op.endswith("_backward")]

    @pytest.mark.parametrize("op", ops())
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_every_op_is_decided(self, op: str, device: str) -> None:
        decision = why(op, [SIZES[name] for name in sizes(op)], dtype=torch.bfloat16, device=device)
        assert [row.outcome for row in decision.rows].count("chosen") == 1
        assert all(row.reason for row in decision.rows if row.outcome == "refused")
        declared = {implementation.backend.name for implementation in dispatch.implementations(op)}
        backends = [row.backend for row in decision.rows]
        assert set(backends) >= {"cuda", "triton", "cpu", "reference"} | declared
        assert len(set(backends)) == len(backends), "each once, however many implementations it has"

    def test_is_the_dispatchers_decision(self) -> None:
        x = torch.randn(6, 64)
        with dispatch.recording(recorder := Recorder()):
            llmkern.ops.rms_norm(x, torch.ones(64))
        assert why("rms_norm", (6, 64)).served_by == recorder.backends[0]

    def test_capability_decides_as_if_the_gpu_were_there(self, monkeypatch) -> None:
        backend = dispatch.register("test-gpu", priority=900, devices=("cuda",), missing=lambda: "there is no such GPU")
        op = registry.OPS["gelu"]
        monkeypatch.setattr(op, "implementations", op.implementations)
        try:
            llmkern.implements("gelu", backend, min_capability=(9, 0))(lambda **_: None)
            rows = [why("gelu", (2, 8), device="cuda", capability=c).rows[0] for c in (None, (8, 0), (9, 0), (10, 0))]
        finally:
            del registry._BACKENDS["test-gpu"]
        assert [row.backend for row in rows] == ["test-gpu"] * 4
        assert [row.outcome for row in rows] == ["refused", "refused", "chosen", "chosen"]
        assert rows[0].reason == "there is no such GPU"
        assert rows[1].reason == "needs compute capability 9.0, the device has 8.0"

    def test_a_gradient_is_taken_into_account(self) -> None:
        shape = (1, 4, 2, 1, 64, 32)
        assert not any("gradient" in row.reason for row in why("attention_decode", shape).rows)
        assert any("gradient" in row.reason for row in why("attention_decode", shape, grad=True).rows)

    def test_prints_and_json_agree(self, llmkern_) -> None:
        call = ("why", "attention", "--shape", "1,4,2,8,8,32", "--arg", "causal=true", "--arg", "window=4")
        status, out, _ = llmkern_(*call)
        assert status == 0
        assert "causal=True" in out
        assert "window=[3, 3]" in out
        status, out, _ = llmkern_(*call, "--json")
        found = json.loads(out)
        assert found["served_by"] in [row["backend"] for row in found["rows"]]

    def test_forced_and_strict(self, llmkern_) -> None:
        status, out, _ = llmkern_("--backend", "reference", "why", "gelu", "--shape", "2,8", "--json")
        assert (status, json.loads(out)["served_by"]) == (0, "reference")
        settings.backend = None
        status, out, _ = llmkern_("--backend", "cuda", "why", "gelu", "--shape", "2,8", "--json")
        assert (status, json.loads(out)["served_by"]) == (1, None)

    def test_help_gives_the_meaning_of_shape(self, llmkern_) -> None:
        _, out, _ = llmkern_("why", "--help")
        for op in ops():
            assert any(line.split() == [op, ",".join(sizes(op))] for line in out.splitlines())


def test_why_has_one_row_for_each_backend() -> None:
    for op in ("rms_norm", "attention"):
        backends = [row.backend for row in why(op, [8] * len(sizes(op))).rows]
        assert len(backends) == len(set(backends))
