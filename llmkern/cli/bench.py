"""`llmkern bench`: ops, models, and what has changed since."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import torch
import typer

from llmkern.cli import bench_families, bench_serve, bench_train
from llmkern.cli.arguments import device_named, dtype_named
from llmkern.cli.bench_results import Outputs, kept_on_interrupt, new_result, recorded
from llmkern.cli.command import Command
from llmkern.cli.models import DEVICE_HELP, load, token_ids
from llmkern.cli.models import HELP as MODEL_HELP
from llmkern.cli.output import print_json, say, task

if TYPE_CHECKING:
    from llmkern.bench.run_models import Plan

__all__ = ["bench"]

_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
bench = typer.Typer(
    help="""Kernels and whole models against every peer at hand, in one run: checked first, then timed, interleaved.

    \b
    llmkern bench ops --quick
    llmkern bench model demo:smollm2 --quick
    llmkern bench serve demo:smollm2 --clients 1,4,16
    llmkern bench families --quick
    llmkern bench train demo:smollm2
    llmkern bench compare old.json new.json
    """,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=_HELP,
)

bench.command("serve", cls=Command, context_settings=_HELP)(bench_serve.serve)
bench.command("train", cls=Command, context_settings=_HELP)(bench_train.train)
bench.command("families", cls=Command, context_settings=_HELP)(bench_families.families)

# Seconds of measuring for each contender at each point.
SECONDS, QUICK_SECONDS = 1.0, 0.15

_Json = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - prints it in place of the tables."),
]
_Plot = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--plot", metavar="DIR", help="Write PNG plots into this folder."),
]
_Record = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--record", metavar="DIR", help="Keep JSON and plots under DIR/results and DIR/plots, by device."),
]
_Html = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--html", metavar="FILE", help="Write one self-contained page."),
]


@bench.command("ops", cls=Command, context_settings=_HELP)
def ops(
    op: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME,…", help="These ops; all of them without."),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu, cuda or tpu; auto takes a GPU where there is one.")
    ] = "auto",
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME,…", help="In place of the dtypes of the sweeps."),
    ] = None,
    shape: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="N,N,…", help="One call of one op in place of its sweeps; sizes as for llmkern why."),
    ] = None,
    peers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME,…", help="These peers; without, all that are there; none: llmkern alone."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few points, in one dtype: under three minutes.")] = False,
    as_csv: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--csv", metavar="FILE", help="Write a CSV with the columns of Liger-Kernel's."),
    ] = None,
    as_json: _Json = None,
    plot: _Plot = None,
    html: _Html = None,
    record: _Record = None,
) -> None:
    """Time ops against every peer at hand, after checking each result against the reference in float64.

    \b
    llmkern bench ops --quick
    llmkern bench ops --op rms_norm,swiglu --dtype bfloat16 --json ops.json --plot plots
    llmkern bench ops --op attention --shape 1,32,8,2048,2048,128 --device cuda
    llmkern bench ops --device tpu --dtype bfloat16
    """
    from llmkern.backends.tpu import DEVICE as TPU_DEVICE
    from llmkern.bench import tpu
    from llmkern.bench.ceilings import ceilings
    from llmkern.bench.peer import peers_named
    from llmkern.bench.run_ops import contenders, run_points
    from llmkern.bench.sweep import definition, ops_with_sweeps, points
    from llmkern.bench.timers import clock_for
    from llmkern.jax._chips import current

    on_tpu = device == "tpu"
    if on_tpu and (reason := tpu.missing()) is not None:
        raise ValueError(f"--device is 'tpu': {reason}")
    place = torch.device(TPU_DEVICE) if on_tpu else device_named(device)
    inputs_on = torch.device("cpu") if on_tpu else place
    names = ops_with_sweeps() if op is None else op.split(",")
    for name in names:
        definition(name)
    names = tpu.ops_on_tpu(names) if on_tpu else names
    dtypes = None if dtype is None else [dtype_named(name) for name in dtype.split(",")]
    sizes = None if shape is None else _sizes(names, shape)
    chosen = peers_named(peers)
    absent = {name: reason for name, peer in chosen.items() if (reason := peer.missing()) is not None}
    as_json, plot = recorded(record, "ops", place, as_json, plot)
    outputs = Outputs(as_json, plot, html, as_csv)
    result = new_result(place, {"absent_peers": absent, "left_out": []})
    todo = [point for name in names for point in points(name, inputs_on, dtypes=dtypes, quick=quick, shape=sizes)]
    if on_tpu:
        todo = [point for point in todo if point.mode == "forward"]  # there are no gradients
    with kept_on_interrupt(result, outputs):
        say("measuring the device's ceilings")
        ceiling = tpu.chip_ceilings(current()) if on_tpu else ceilings(place)
        result.environment["ceilings"] = ceiling.to_dict()
        with task(f"measuring {len(todo)} points") as progress:
            run_points(
                todo,
                [peer for name, peer in chosen.items() if name not in absent],
                clock_for(inputs_on),
                ceiling,
                seconds=QUICK_SECONDS if quick else SECONDS,
                add=result.rows.extend,
                left_out=result.environment["left_out"].append,
                progress=progress,
                chosen=tpu.contenders if on_tpu else contenders,
            )


@bench.command("model", cls=Command, context_settings=_HELP)
def model(
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="[MODEL]", help=MODEL_HELP),
    ] = None,
    config: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="Random weights of a published shape, in place of MODEL: llama-3-8b …"),
    ] = None,
    variants: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME,…", help="These, as NAME or NAME@DTYPE; without, those that are usual."),
    ] = None,
    batch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", help="Sequences at a time; 1, of encoders 32."),
    ] = None,
    prompt_len: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", help="Tokens of each; 512, of encoders 128."),
    ] = None,
    new_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", help="Tokens to generate; 128, with --quick 32."),
    ] = None,
    tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", help="Tokens of real prose for the perplexity; 4096, with --quick 1024; 0: none."),
    ] = None,
    quantize: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="SCHEME", help="int8: the untouched model and the int8 variants only."),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile too, which takes minutes.")] = False,
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="In place of each variant's own."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help=DEVICE_HELP)] = "auto",
    rounds: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", help="Repetitions of each variant, in turn; 7, with --quick 3."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer variants, tokens and rounds: under 3 minutes.")] = False,
    as_json: _Json = None,
    plot: _Plot = None,
    html: _Html = None,
    record: _Record = None,
) -> None:
    """Time a whole model, untouched, by llmkern and by every peer at hand, each in a process of its own, in turn.

    Perplexity and agreement with the untouched model stand beside the speed.  Memory is the peak of the process
    while it is timed: libraries, weights and cache; on a GPU what torch has allocated.

    \b
    llmkern bench model demo:smollm2 --quick
    llmkern bench model demo:minilm --json minilm.json --plot plots
    llmkern bench model --config llama-3-8b --device cuda --dtype bfloat16 --batch 8
    llmkern bench model demo:smollm2 --variants sdpa,llmkern-int8@bf16,llama.cpp-Q8_0
    """
    from llmkern.bench import peer
    from llmkern.bench.run_models import at_once, choose, run_models

    if (model is None) == (config is None):
        raise ValueError("give MODEL or --config NAME, one of the two")
    if quantize not in (None, "int8"):
        raise ValueError(f"--quantize is {quantize!r}, expected int8 (--variants names others, llmkern-int4 for one)")
    for option, value in (("batch", batch), ("prompt-len", prompt_len), ("new-tokens", new_tokens), ("rounds", rounds)):
        if value is not None and value < 1:
            raise ValueError(f"--{option} is {value}, expected at least 1")
    plan, parameters = _plan(
        model,
        config,
        device_named(device),
        batch=batch,
        prompt_len=prompt_len,
        new_tokens=new_tokens or (32 if quick else 128),
        tokens=tokens if tokens is not None else (1024 if quick else 4096),
        rounds=rounds or (3 if quick else 7),
    )
    chosen = choose(
        peer.variants(),
        plan.spec.kind,
        names=variants,
        dtype=None if dtype is None else str(dtype_named(dtype)).removeprefix("torch."),
        int8=quantize is not None,
        compiled=compiled,
        quick=quick,
    )
    as_json, plot = recorded(record, plan.name, plan.spec.device, as_json, plot)
    outputs = Outputs(as_json, plot, html)
    result = new_result(plan.spec.device, {"absent_peers": {}, "left_out": []})
    with kept_on_interrupt(result, outputs), task(f"measuring {len(chosen)} variants of {plan.name}") as progress:
        run_models(
            plan,
            chosen,
            peer.peers(),
            add=result.rows.extend,
            absent=result.environment["absent_peers"],
            at_once=at_once(plan, parameters),
            progress=progress,
        )


def _plan(
    model: str | None,
    config: str | None,
    device: torch.device,
    *,
    batch: int | None,
    prompt_len: int | None,
    new_tokens: int,
    tokens: int,
    rounds: int,
) -> tuple[Plan, int]:
    """The model's kind, the text, and the sizes that were not given; with the number of the model's parameters."""
    from transformers import AutoModel

    from llmkern.bench.run_models import Plan
    from llmkern.bench.variants import Spec, kind_of, published_config

    if config is not None:
        shape, tokenizer = published_config(config), None
        with torch.device("meta"):
            parameters = AutoModel.from_config(shape).num_parameters()
        tokens = 0  # random weights have no perplexity worth the name
    else:
        loaded = load(str(model), device="cpu")
        shape, tokenizer = loaded.model.config, loaded
        parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    kind = kind_of(shape)
    causal = kind == "causal"
    batch, prompt_len = batch or (1 if causal else 32), prompt_len or (512 if causal else 128)
    longest = getattr(shape, "max_position_embeddings", None) or prompt_len + new_tokens
    length = prompt_len + (new_tokens if causal else 0)
    if length > longest:
        raise ValueError(f"--prompt-len and --new-tokens make {length} tokens, expected at most {longest}")
    count = max(tokens, batch * prompt_len, 512)
    if tokenizer is None:
        ids = torch.randint(0, shape.vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    else:
        ids = token_ids(tokenizer, count).tolist()
    spec = Spec(
        model,
        config,
        kind,
        "float32",
        str(device),
        batch,
        prompt_len,
        new_tokens if causal else 0,
        torch.get_num_threads(),
    )
    x: dict[str, Any] = {"batch": batch, "prompt_len": prompt_len}
    x |= {"new_tokens": new_tokens} if causal else {}
    return Plan(str(config or model), spec, ids, tokens, rounds, x), parameters


@bench.command("compare", cls=Command, context_settings=_HELP)
def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD.json", help="What to compare with.")],
    new: Annotated[Path, typer.Argument(metavar="NEW.json", help="What is compared.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ratios of two results, and which of them are beyond the noise of both runs.

    \b
    llmkern bench compare before.json after.json
    """
    from llmkern.bench.compare import compare as run
    from llmkern.bench.schema import Result

    found = run(Result.load(old), Result.load(new))
    if as_json:
        print_json(found.to_dict())
    else:
        print(found)


def _sizes(names: list[str], shape: str) -> dict[str, int]:
    from llmkern.why import sizes

    if len(names) != 1:
        raise ValueError("--shape is for one op: give it with --op NAME")
    expected = sizes(names[0])
    parts = shape.split(",")
    if len(parts) != len(expected) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--shape is {shape!r}, expected {','.join(expected)} as whole numbers of at least 1")
    return dict(zip(expected, map(int, parts), strict=True))
