"""Distillation: the loss is the formula's, a killed run goes on to the same weights, bad input."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import llmkern
from llmkern.bench.readme import newest_models, results
from llmkern.cli import run as run_command
from llmkern.cli.models import Loaded
from llmkern.training import distill

transformers = pytest.importorskip("transformers")
WORDS, LENGTH = 67, 16


def model(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**{"vocab_size": WORDS, "max_position_embeddings": 64} | sizes | changes)
    return transformers.LlamaForCausalLM(config).eval()


class Loud(transformers.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


def text(tokens: int = 32 * LENGTH) -> torch.Tensor:
    return torch.randint(WORDS, (tokens,), generator=torch.Generator().manual_seed(0))


def run(student: Any, teacher: Any, folder: Path, **options: Any) -> Any:
    defaults = {"steps": 4, "length": LENGTH, "batch_size": 2, "learning_rate": 1e-2, "show_progress": False}
    return distill(student, teacher, text(), str(folder), **defaults | options)


def by_hand(student: Any, teacher: Any, ids: torch.Tensor, hard: float) -> torch.Tensor:
    with torch.no_grad():
        wanted = teacher(ids).logits[:, :-1].log_softmax(-1).flatten(0, 1)
    logits = student(ids).logits[:, :-1].flatten(0, 1)
    soft = F.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
    return (1 - hard) * soft + hard * F.cross_entropy(logits, ids[:, 1:].flatten())


@pytest.mark.parametrize("hard", [0.0, 0.3])
def test_the_first_step_is_the_formulas(tmp_path: Path, hard: float) -> None:
    teacher, student = model(0, hidden_size=64), model(1)
    expected = copy.deepcopy(student)
    # One block, so that any order of the samples is the same; the optimizer as Trainer makes it.
    ids = text(LENGTH)[None]
    loss = by_hand(expected, teacher, ids, hard)
    found = distill(
        student, teacher, ids[0], str(tmp_path), steps=1, length=LENGTH, batch_size=1, hard=hard, show_progress=False
    )
    assert found.losses == ((1, pytest.approx(loss.item(), rel=1e-3)),)


def test_a_student_learns_and_is_saved(tmp_path: Path) -> None:
    teacher, student = model(0), model(1)
    frozen = copy.deepcopy(teacher.state_dict())
    llmkern.optimize_(teacher)
    found = run(student, teacher, tmp_path, steps=30, save_every=30)
    assert found.losses[-1][1] < 0.7 * found.losses[0][1]
    assert [step for step, _ in found.losses] == list(range(1, 31))
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), student.parameters(), strict=True))
    pytest.importorskip("matplotlib")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, whole, stopped = model(0), model(1), model(1)
    run(whole, teacher, tmp_path / "whole", steps=6, save_every=2)

    class Killed(BaseException):
        pass

    step = torch.optim.AdamW.step
    calls = iter(range(100))

    def die(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 4:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", die)
        with pytest.raises(Killed):
            run(stopped, teacher, tmp_path / "stopped", steps=6, save_every=2)
    again = model(2)  # another process: nothing of the first one's is left
    found = run(again, teacher, tmp_path / "stopped", steps=6, save_every=2, resume=True)
    assert [step for step, _ in found.losses] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


class Tokenizer:
    """Bytes, folded into the vocabulary."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [byte % WORDS for byte in text.encode()]}

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").touch()


def test_the_command_prunes_heals_and_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llmkern.cli.distill.load", lambda name, **_: Loaded(name, model(0), Tokenizer()))
    words, target = tmp_path / "words.txt", tmp_path / "healed"
    words.write_text("the same words again and again, " * 40)
    sizes = ["--length", "32", "--batch-size", "2", "--held-out", "128"]
    command = ["distill", "tiny", str(target), "--text", str(words), "--prune", "0.5", *sizes]
    kept = ["--record", str(tmp_path / "kept")]
    assert run_command([*command, "--steps", "20", "--learning-rate", "0.01", "--hard", "1", "--json", *kept]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["losses"]) == found["steps"] == 20
    assert list(found["perplexity"]) == ["teacher", "pruned", "healed"]
    assert found["perplexity"]["healed"] < 0.5 * found["perplexity"]["pruned"]
    (_, result), *_ = results(tmp_path / "kept")
    assert {row.provider: row.p50 for row in result.rows} == found["perplexity"]
    assert "| healed |" in newest_models(tmp_path / "kept")
    assert transformers.LlamaForCausalLM.from_pretrained(target).config.intermediate_size == 32
    assert (target / "tokenizer.json").exists()
    assert run_command(["distill", "tiny", str(tmp_path / "none"), "--text", str(words)]) == 2
    assert "--student is not given, nor --prune" in capsys.readouterr().err
    assert run_command([*command, "--held-out", "2000"]) == 2


def test_bad_input_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="student has 30 words and teacher 67, expected one vocabulary"):
        run(model(vocab_size=30), model(), tmp_path)
    with pytest.raises(ValueError, match="hard is 2, expected 0 to 1"):
        run(model(), model(), tmp_path, hard=2)
    with pytest.raises(ValueError, match="steps is 0, expected at least 1"):
        run(model(), model(), tmp_path, steps=0)
    with pytest.raises(ValueError, match=r"data has shape \[512\], expected \[N\] with at least 1000 tokens"):
        run(model(), model(), tmp_path, length=1000)
    with pytest.raises(ValueError, match="expected a causal language model"):
        run(torch.nn.Linear(2, 2), model(), tmp_path)
    with pytest.raises(ValueError, match="student is a Loud, which changes its logits after its head"):
        run(Loud(model().config), model(), tmp_path)
    assert not list(tmp_path.iterdir())
