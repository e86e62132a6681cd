"""`llmkern distill`: a student heals on what its teacher says of a text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from torch import Tensor

from llmkern.cli.models import DEVICE_HELP, HELP, Loaded, load
from llmkern.cli.output import print_json, say, working
from llmkern.swap import optimize_
from llmkern.table import render

__all__ = ["distill"]

PROSE = "demo:prose"
CALIBRATION = 8  # blocks of the text by which the least important channels are found


def distill(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help=HELP)],
    target: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder for the student and its checkpoints.")],
    student: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time, on 3.10 too)
        typer.Option(metavar="MODEL", help="The student; without, the teacher itself, pruned."),
    ] = None,
    prune: Annotated[float, typer.Option(metavar="SHARE", help="Take this share of the student's MLP out.")] = 0.0,
    text: Annotated[
        str, typer.Option(metavar="FILE", help=f"A text in UTF-8; {PROSE}: 75,000 tokens of news.")
    ] = PROSE,
    steps: Annotated[int, typer.Option(metavar="N", help="Steps of the optimizer.")] = 200,
    length: Annotated[int, typer.Option(metavar="N", help="Tokens of a block.")] = 512,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Blocks of a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(metavar="R", help="The largest one of the cosine schedule.")] = 1e-4,
    temperature: Annotated[float, typer.Option(metavar="T", help="Softens both models' probabilities.")] = 1.0,
    hard: Annotated[float, typer.Option(metavar="SHARE", help="Share of the text's own loss, 0 to 1.")] = 0.0,
    held_out: Annotated[int, typer.Option(metavar="N", help="Last tokens of the text, kept for perplexity.")] = 4096,
    save_every: Annotated[int, typer.Option(metavar="N", help="Steps between checkpoints.")] = 50,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUTPUT's last checkpoint.")] = False,
    device: Annotated[str, typer.Option(metavar="NAME", help=DEVICE_HELP)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the losses and perplexities as JSON.")] = False,
    record: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--record", metavar="DIR", help="Keep the perplexities under DIR/results, by device."),
    ] = None,
) -> None:
    """Train a student to predict as its teacher does, and print the perplexities before and after.

    The student is another model of the same vocabulary, or the teacher with a share of its MLP taken out.  The loss is
    the Kullback-Leibler divergence of the next tokens; OUTPUT is a checkpoint of transformers.  A run that was killed
    goes on with --resume.

    \b
    llmkern distill demo:smollm2 healed/ --prune 0.25 --steps 200 --batch-size 2 --learning-rate 3e-4
    llmkern distill ./large ./small-distilled --student ./small --text corpus.txt --hard 0.3
    """
    from llmkern.quantization.pruning import prune_
    from llmkern.testing.perplexity import perplexity
    from llmkern.training import distill as run

    if student is None and not prune:
        raise ValueError("--student is not given, nor --prune: the teacher would learn from itself")
    original = load(teacher, dtype="float32", device=device)
    ids = _ids(original, text, held_out + length)
    learner = load(student or teacher, dtype="float32", device=device)
    test = ids[-held_out:]
    found: dict[str, float] = {}

    def judge(name: str, model: Any) -> None:
        with working(f"perplexity, {name}"):
            found[name] = perplexity(model, test)

    judge("teacher", original.model)
    if prune:
        if student is not None:
            judge("student", learner.model)
        with working("pruning the MLPs"):
            blocks = ids[:-held_out].split(length)[:CALIBRATION]
            prune_(learner.model, mlp=prune, calib=[{"input_ids": block[None]} for block in blocks])
    judge("pruned" if prune else "student", learner.model)
    optimize_(original.model, on_unsupported="ignore")
    optimize_(learner.model, on_unsupported="ignore")
    result = run(
        learner.model,
        original.model,
        ids[:-held_out],
        str(target),
        steps=steps,
        length=length,
        batch_size=batch_size,
        learning_rate=learning_rate,
        temperature=temperature,
        hard=hard,
        save_every=save_every,
        resume=resume,
        show_progress=not as_json,
    )
    judge("healed" if prune else "distilled", learner.model)
    learner.tokenizer.save_pretrained(target)
    if record is not None:
        what = f", {prune:.0%} of the MLP pruned" if prune else ""
        x = {"steps": steps, "batch": batch_size, "length": length}
        _record(record, f"{student or teacher}{what}", x, learner.model, found, held_out)
    if as_json:
        print_json(asdict(result) | {"perplexity": found})
        return
    rows = [(name, f"{value:.3f}") for name, value in found.items()]
    print(render(f"perplexity of the text's last {held_out:,} tokens", ("model", "perplexity"), rows))
    say(str(result))


def _record(folder: Path, name: str, x: dict[str, Any], model: Any, found: dict[str, float], tokens: int) -> None:
    """Keep the perplexities found as a result of `llmkern bench`, whose tables show them."""
    from llmkern.bench.schema import Row
    from llmkern.cli.bench_results import new_result, recorded

    device = next(model.parameters()).device
    result = new_result(device, {"absent_peers": {}, "left_out": []})
    for provider, value in found.items():
        row = Row("model", name, provider, "perplexity", x, p50=value, detail={"tokens": tokens})
        row.accuracy["perplexity"] = value
        result.rows.append(row)
    path, _ = recorded(folder, f"distill {name}", device, None, None)
    assert path is not None
    result.save(path)


def _ids(teacher: Loaded, text: str, least: int) -> Tensor:
    """The text's tokens; ValueError where there are fewer than are needed."""
    import torch

    from llmkern.testing.real_models import prose

    if teacher.tokenizer is None:
        raise ValueError(f"TEACHER {teacher.name} has no tokenizer, so it cannot read a text")
    words = prose() if text == PROSE else Path(text).read_text(encoding="utf-8")
    ids = torch.tensor(teacher.tokenizer(words, add_special_tokens=False)["input_ids"])
    if ids.numel() < least:
        raise ValueError(f"--text is {text}, which has {ids.numel()} tokens, expected at least {least}")
    return ids
