"""`llmkern bench families`: every family of models, untouched beside optimized."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import torch
import typer

from llmkern.cli.bench_results import Outputs, kept_on_interrupt, new_result, recorded
from llmkern.cli.output import task

__all__ = ["families"]


def families(
    only: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time, on 3.10 too)
        typer.Option("--families", metavar="NAME,…", help="These families; all of them without."),
    ] = None,
    dtypes: Annotated[str, typer.Option(metavar="NAME,…", help="Some of fp32, bf16 and int8.")] = "fp32,bf16,int8",
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", help="Threads of PyTorch and of the kernels; PyTorch's choice without."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two layers, shorter inputs, few rounds.")] = False,
    as_json: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", metavar="FILE", help="Write the result as JSON; - prints it in place of the table."),
    ] = None,
    record: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--record", metavar="DIR", help="Keep the JSON under DIR/results, by device."),
    ] = None,
) -> None:
    """Time every family on the CPU, untouched beside optimized, after judging its outputs.

    Shapes are published ones with 6 layers (fewer where two copies of them need more than 6 GB) and random weights.
    Vocabularies are cut to 4096, so that output heads do not outweigh the layers, and experts to those that fit.
    int8 stands beside untouched fp32.  One sequence, image or second of sound at a time.

    \b
    llmkern bench families --quick
    llmkern bench families --families gpt2,whisper --dtypes bf16 --json families.json
    """
    from llmkern.bench import families as suite

    known = suite.families()
    names = list(known) if only is None else only.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"--families has {name!r}, expected some of {', '.join(known)}")
    chosen = dtypes.split(",")
    for dtype in chosen:
        if dtype not in suite.DTYPES:
            raise ValueError(f"--dtypes has {dtype!r}, expected some of {', '.join(suite.DTYPES)}")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads is {threads}, expected at least 1")
    device = torch.device("cpu")
    as_json, _ = recorded(record, "families", device, as_json, None)
    outputs = Outputs(as_json, None, None)
    quickly = suite.Sizes(layers=2, tokens=64, steps=8, rounds=3, seconds=0.5, parameters=250_000_000)
    sizes = quickly if quick else suite.Sizes()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        result = new_result(device, {"absent_peers": {}, "left_out": []})
        with kept_on_interrupt(result, outputs), task(f"measuring {len(names)} families", every=30.0) as progress:
            for done, name in enumerate(names):
                progress(done, len(names))
                result.rows.extend(suite.measure_family(name, known[name], chosen, sizes))
    finally:
        torch.set_num_threads(before)
