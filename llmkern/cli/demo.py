"""`llmkern demo`: two real models, untouched, optimized and in int8, side by side.  Every figure is measured here."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from llmkern.cli.check import Check, run_check
from llmkern.cli.generate import Generation
from llmkern.cli.models import load, quantize
from llmkern.cli.output import print_json, task, working
from llmkern.config import settings
from llmkern.swap import optimize_, patched
from llmkern.table import render

__all__ = ["demo"]

PROMPT = "Why is the sky blue? Answer in two sentences."
ANSWER_TOKENS = 48
PERPLEXITY_TOKENS = 1024
# Rounds of all variants, each run in a process of its own; the better run of a variant counts.
ROUNDS = 2
VARIANTS = {"untouched": ["--no-optimize"], "optimized": [], "optimized + int8": ["--quantize", "int8"]}
SENTENCES = (
    "The cat sat quietly on the windowsill.",
    "A kitten was resting by the window.",
    "The central bank raised interest rates again.",
    "Borrowing has become more expensive this year.",
)


def demo(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Two real models: what was swapped, how exact it is, how fast it answers; about two minutes on two cores.

    SmolLM2-135M-Instruct answers a question untouched, optimized and in int8; all-MiniLM-L6-v2 compares sentences.
    Exit status 1 where a model is outside the accuracy rule.

    \b
    llmkern demo
    llmkern demo --json > demo.json
    """
    show: Callable[[object], None] = (lambda value: None) if as_json else _show
    show("\n== SmolLM2-135M-Instruct: swap, compare on real text, undo ==")
    language = run_check(load("demo:smollm2"), tokens=PERPLEXITY_TOKENS, scheme="int8")
    show(language)
    show(f"\n== The same question to each: {PROMPT} ==")
    answers = _answers(stream=not as_json)
    show(_speeds(answers))
    show("\n== all-MiniLM-L6-v2: swap, compare on real text, undo ==")
    sentences, similarities = _similarities()
    show(sentences)
    show(_similarity_table(similarities))
    if as_json:
        print_json(
            {
                "smollm2": language.to_dict(),
                "generation": {name: vars(answer) for name, answer in answers.items()},
                "minilm": sentences.to_dict() | {"similarities": similarities},
            }
        )
    if language.failures or sentences.failures:
        raise typer.Exit(1)


def _show(value: object) -> None:
    print(value, flush=True)


def _answers(*, stream: bool) -> dict[str, Generation]:
    """Each variant's better run; the first round is streamed."""
    found: dict[str, list[Generation]] = {name: [] for name in VARIANTS}
    for name in VARIANTS:
        if stream:
            _show(f"\n{name}:")
        found[name].append(_answer(name, stream=stream))
    repeats = [name for _ in range(ROUNDS - 1) for name in reversed(VARIANTS)]
    with task("measuring each again, in the opposite order") as progress:
        for done, name in enumerate(repeats):
            progress(done, len(repeats))
            found[name].append(_answer(name, stream=False))
    return {name: max(runs, key=lambda run: run.tokens_per_second or 0.0) for name, runs in found.items()}


def _answer(variant: str, *, stream: bool) -> Generation:
    """One run of `llmkern generate` in a process of its own, so that its peak memory is its own too."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "llmkern", "generate", "demo:smollm2", "--prompt", PROMPT]
        command += ["--max-new-tokens", str(ANSWER_TOKENS), "--save", str(result), *VARIANTS[variant]]
        forced = {"LLMKERN_BACKEND": settings.backend or "", "LLMKERN_STRICT": str(int(settings.strict))}
        finished = subprocess.run(
            command,
            env=os.environ | forced,
            stdout=None if stream else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if finished.returncode:
            raise RuntimeError(f"{variant} ended with status {finished.returncode}: {finished.stderr}")
        return Generation(**json.loads(result.read_text())["result"])


def _speeds(answers: dict[str, Generation]) -> str:
    base = answers["untouched"]
    rows: list[list[object]] = [
        ["tokens/s", *[f"{answer.tokens_per_second or 0:.1f}" for answer in answers.values()]],
        ["first token, ms", *[f"{answer.ttft_ms:.0f}" for answer in answers.values()]],
        ["peak memory, MiB", *[f"{answer.peak_memory_bytes / 2**20:.0f}" for answer in answers.values()]],
        ["same answer", *["yes" if answer.text == base.text else "no" for answer in answers.values()]],
    ]
    title = f"greedy, {base.prompt_tokens} tokens in, {base.tokens} out; the better of {ROUNDS} runs each"
    return render(title, ("", *answers), rows)


def _similarities() -> tuple[Check, list[dict[str, Any]]]:
    """MiniLM's check, and the cosine similarity of each pair of sentences by variant."""
    from llmkern.testing.real_models import embed

    loaded = load("demo:minilm")
    found = run_check(loaded, tokens=PERPLEXITY_TOKENS)
    model: Any = loaded.model
    with working("embedding the sentences"):
        embeddings = {"untouched": embed(model, loaded.tokenizer, SENTENCES)}
        with patched(model, on_unsupported="ignore"):
            embeddings["optimized"] = embed(model, loaded.tokenizer, SENTENCES)
    quantized = copy.deepcopy(model)
    quantize(quantized, loaded)
    optimize_(quantized, on_unsupported="ignore")
    with working("embedding them in int8"):
        embeddings["optimized + int8"] = embed(quantized, loaded.tokenizer, SENTENCES)
    pairs = itertools.combinations(range(len(SENTENCES)), 2)
    return found, [
        {"a": SENTENCES[i], "b": SENTENCES[j]}
        | {name: float(torch.dot(rows[i], rows[j])) for name, rows in embeddings.items()}
        for i, j in pairs
    ]


def _similarity_table(similarities: list[dict[str, Any]]) -> str:
    headers = list(similarities[0])
    rows = [[f"{v:.4f}" if isinstance(v, float) else v for v in row.values()] for row in similarities]
    return render("cosine similarity", headers, rows)
