from __future__ import annotations

import pytest

from llmkern.bench import families as suite
from llmkern.bench.schema import Result
from llmkern.cli import run

TINY = {
    "gpt2": suite.Family("tiny", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 9, "n_head": 2, "vocab_size": 99}),
    "bert": suite.Family(
        "tiny",
        "BertModel",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9},
    ),
}


@pytest.fixture
def tiny(monkeypatch) -> None:
    monkeypatch.setattr(suite, "families", lambda: TINY)


def test_two_families_from_the_command_line(tiny, tmp_path, capsys) -> None:
    path = tmp_path / "families.json"
    assert run(["bench", "families", "--quick", "--dtypes", "fp32", "--threads", "1", "--json", str(path)]) == 0
    rows = {(row.name, row.x["phase"]): row for row in Result.load(path).rows}
    assert set(rows) == {("gpt2", "prefill"), ("gpt2", "decode"), ("bert", "encode")}
    for row in rows.values():
        assert row.error is None
        assert row.x["layers"] == 2
        assert row.detail["ratio"]["p20"] <= row.detail["ratio"]["p50"] <= row.detail["ratio"]["p80"]
        assert row.detail["layers"]
        assert "error" in row.accuracy
    assert "optimized ÷ untouched" in capsys.readouterr().out


def test_what_is_wrong_is_not_timed(monkeypatch) -> None:
    monkeypatch.setattr(suite, "optimize_", lambda model, **_: model.get_input_embeddings().weight.data.mul_(2))
    (row,) = suite.measure_family("gpt2", TINY["gpt2"], ["fp32"], suite.Sizes(1, 4, 1, 1, 0.0))
    assert row.p50 is None
    assert row.error.startswith("not timed, the result is wrong: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--families", "gpt5"], "--families has 'gpt5', expected some of llama, "),
        (["--dtypes", "fp8"], "--dtypes has 'fp8', expected some of fp32, bf16, int8"),
        (["--threads", "0"], "--threads is 0, expected at least 1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], message: str, capsys) -> None:
    assert run(["bench", "families", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
