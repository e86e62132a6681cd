"""`llmkern batch`: a model over every row of a file."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from llmkern.cli.arguments import SCHEMES, check_scheme, least_and_most
from llmkern.cli.models import DEVICE_HELP, DTYPE_HELP, HELP, load_prepared
from llmkern.cli.output import print_json, say, task
from llmkern.serve.options import LONGEST_CONTEXT

__all__ = ["batch"]

_LINES_EVERY = 30.0  # seconds, where there is no terminal to draw a bar on


def batch(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=HELP)],
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="A .jsonl, .csv or .parquet file, or a folder of them.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A new folder.")],
    column: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time, on 3.10 too)
        typer.Option(metavar="NAME", help="Where the text is; else prompt, messages, text or input."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="T", help="0 takes the most likely token.")] = 0.0,
    scheme: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--quantize", metavar="SCHEME", help=f"Quantize the weights after loading: {SCHEMES}."),
    ] = None,
    optimize: Annotated[bool, typer.Option(help="Swap kernels in; --no-optimize runs the model untouched.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the job that OUTPUT has.")] = False,
    workers: Annotated[str, typer.Option(metavar="N or N..M", help="Workers, each with a model of its own.")] = "1",
    cpus: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", help="CPUs of each worker; else a machine's, divided."),
    ] = None,
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="HOST:PORT", help="A Ray cluster, which reads INPUT by the same path; else this machine."),
    ] = None,
    max_concurrent: Annotated[int, typer.Option(metavar="N", help="Rows that a worker answers at a time.")] = 16,
    max_context: Annotated[
        int,
        typer.Option(metavar="N", help=f"Tokens of prompt and answer; 0: the model's own, {LONGEST_CONTEXT} at most."),
    ] = 0,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--served-model-name", metavar="NAME", help="What OpenAI's batch files call the model."),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help=DTYPE_HELP)] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help=DEVICE_HELP)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Answer each row of INPUT once: a language model continues or answers the text, an encoder embeds it.

    OUTPUT gets files of the same format, whose rows have `output` (or `embedding`) and `error` besides; a row that
    cannot be answered has its reason there.  OpenAI's batch files are answered in OpenAI's format.  What a killed job
    has written stays: --resume answers the other rows.  Workers are Ray's; one that dies is started again.

    \b
    llmkern batch demo:smollm2 questions.jsonl answers/ --quantize int8 --max-new-tokens 64
    llmkern batch demo:minilm texts.parquet embeddings/ --workers 1..4 --address 10.0.0.1:6379
    """
    from llmkern.integrations.ray import require

    require("a batch job", "data")
    from llmkern.integrations.ray.batch import run_batch
    from llmkern.serve.options import ServeOptions

    check_scheme(scheme)
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}, expected at least 1")
    if not 0 <= temperature <= 2:
        raise ValueError(f"--temperature is {temperature}, expected 0 to 2")
    if cpus is not None and cpus < 1:
        raise ValueError(f"--cpus is {cpus}, expected at least 1")
    options = ServeOptions(name or model, max_context, max_concurrent=max_concurrent)
    make = functools.partial(load_prepared, model, scheme, optimize=optimize, dtype=dtype, device=device)
    with task(f"answering {source}", every=_LINES_EVERY) as progress:
        found = run_batch(
            make,
            source,
            target,
            options=options,
            column=column,
            settings={"max_tokens": max_new_tokens, "temperature": temperature},
            workers=least_and_most("--workers", workers),
            cpus=cpus,
            gpus=1 if device.startswith("cuda") else 0,
            address=address,
            resume=resume,
            progress=progress,
        )
    if as_json:
        print_json(asdict(found))
    else:
        say(f"{found}: {target}")
