"""`llmkern bench train`: a training step, untouched beside optimized."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import torch
import typer

from llmkern.cli.arguments import dtype_named
from llmkern.cli.bench_results import Outputs, kept_on_interrupt, new_result, recorded
from llmkern.cli.models import HELP, load, token_ids
from llmkern.cli.output import task

__all__ = ["train"]

_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=HELP)],
    batch: Annotated[int, typer.Option(metavar="N", help="Sequences of a step.")] = 4,
    length: Annotated[int, typer.Option(metavar="N", help="Tokens of each.")] = 512,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="float32 or bfloat16: the parameters, too.")] = "float32",
    layers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", help="Keep as many layers; 0: the output head and its loss alone."),
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", help="Steps of each variant, in turn.")] = 3,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile too, which takes minutes.")] = False,
    as_json: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads annotations at run time, on 3.10 too)
        typer.Option("--json", metavar="FILE", help="Write the result as JSON; - prints it in place of the table."),
    ] = None,
    record: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--record", metavar="DIR", help="Keep the JSON under DIR/results, by device."),
    ] = None,
) -> None:
    """Time training steps on the CPU (forward with the model's own loss, backward, AdamW), each variant in a process.

    The untouched model, llmkern's, and with --compile torch's; Liger-Kernel where there is a GPU.  Gradients stand
    beside the untouched model's; memory is the peak of the process over its steps, parameters, gradients and the
    optimizer's state included.

    \b
    llmkern bench train demo:smollm2
    llmkern bench train demo:smollm2 --layers 0
    llmkern bench train demo:smollm2 --dtype bfloat16 --batch 1 --length 2048 --compile --json train.json
    """
    from llmkern.bench import peer
    from llmkern.bench.run_models import Plan, choose, run_models
    from llmkern.bench.variants import Spec

    for option, value in (("batch", batch), ("length", length), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"--{option} is {value}, expected at least 1")
    wanted = dtype_named(dtype)
    if wanted not in _SHORT:
        raise ValueError(f"--dtype is {dtype!r}, expected float32 or bfloat16")
    if layers is not None and layers < 0:
        raise ValueError(f"--layers is {layers}, expected at least 0")
    loaded = load(model, device="cpu")
    if not loaded.is_language_model:
        raise ValueError(f"MODEL {model} is a {type(loaded.model).__name__}, expected a causal language model")
    ids = token_ids(loaded, batch * length).tolist()
    del loaded
    name = str(wanted).removeprefix("torch.")
    device = torch.device("cpu")
    spec = Spec(model, None, "training", name, "cpu", batch, length, 0, torch.get_num_threads(), layers)
    what = f"{model}{'' if layers is None else f' of {layers} layers'}"
    plan = Plan(f"{what}, training in {_SHORT[wanted]}", spec, ids, 0, rounds, {"batch": batch, "length": length})
    chosen = choose(peer.variants(), "training", dtype=name, compiled=compiled)
    as_json, _ = recorded(record, f"{what} train {_SHORT[wanted]}", device, as_json, None)
    outputs = Outputs(as_json, None, None)
    result = new_result(device, {"absent_peers": {}, "left_out": []})
    with kept_on_interrupt(result, outputs), task(f"measuring {len(chosen)} variants of {plan.name}") as progress:
        run_models(
            plan,
            chosen,
            peer.peers(),
            add=result.rows.extend,
            absent=result.environment["absent_peers"],
            progress=progress,
        )
