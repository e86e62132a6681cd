"""`llmkern serve`: a model behind OpenAI's API."""

from __future__ import annotations

import functools
from typing import Annotated, Optional

import typer

from llmkern.cli.arguments import SCHEMES, check_scheme, least_and_most
from llmkern.cli.models import DEVICE_HELP, DTYPE_HELP, HELP, load, load_prepared, prepare
from llmkern.cli.output import say
from llmkern.serve.options import LONGEST_CONTEXT

__all__ = ["serve"]


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=HELP)],
    scheme: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time, on 3.10 too)
        typer.Option("--quantize", metavar="SCHEME", help=f"Quantize the weights after loading: {SCHEMES}."),
    ] = None,
    optimize: Annotated[bool, typer.Option(help="Swap kernels in; --no-optimize serves the model untouched.")] = True,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="KEY", envvar="LLMKERN_API_KEY", help="Ask for this key in the Authorization header."),
    ] = None,
    max_concurrent: Annotated[int, typer.Option(metavar="N", help="Sequences generated at a time.")] = 16,
    max_queue: Annotated[int, typer.Option(metavar="N", help="Sequences that may wait; then status 429.")] = 64,
    max_context: Annotated[
        int,
        typer.Option(metavar="N", help=f"Tokens of prompt and answer; 0: the model's own, {LONGEST_CONTEXT} at most."),
    ] = 0,
    max_body: Annotated[int, typer.Option(metavar="BYTES", help="Largest request.")] = 4 << 20,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Longest time for one answer.")] = 600.0,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--served-model-name", metavar="NAME", help="What requests call the model; MODEL if not given."),
    ] = None,
    replicas: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="N..M", help="Replicas of the model, each a process, as many as the load asks for (Ray)."),
    ] = None,
    cpus: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", help="CPUs of each replica; else the machine's, divided."),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help=DTYPE_HELP)] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help=DEVICE_HELP)] = "auto",
) -> None:
    """Serve a model by OpenAI's API, with continuous batching, and a page to chat at /.

    A language model answers /v1/chat/completions and /v1/completions, an encoder /v1/embeddings; both answer
    /v1/models, /tokenize, /health, /version and /metrics (Prometheus).  SIGTERM finishes what runs, then exits 0;
    the exit status is 1 where the worker has died.

    \b
    llmkern serve demo:smollm2 --quantize int8
    llmkern serve demo:smollm2 --quantize int8 --replicas 1..4
    llmkern serve ./my-checkpoint --host 0.0.0.0 --api-key "$KEY" --max-concurrent 32
    """
    from llmkern.serve import require

    require()
    from llmkern.serve.options import ServeOptions
    from llmkern.serve.run import run

    check_scheme(scheme)
    if cpus is not None and (replicas is None or cpus < 1):
        expected = "at least 1" if replicas else "--replicas with it: --cpus is of each replica"
        raise ValueError(f"--cpus is {cpus}, expected {expected}")
    options = ServeOptions(
        name=name or model,
        max_context=max_context,
        host=host,
        port=port,
        api_key=api_key,
        max_concurrent=max_concurrent,
        max_queue=max_queue,
        max_body=max_body,
        timeout=timeout,
    )
    if not options.is_loopback and options.api_key is None:
        say(f"anyone who reaches {host} can use this server: --api-key asks for a key")

    def ready(url: str) -> None:
        say(f"serving {options.name} at {url}")

    if replicas is None:
        loaded = load(model, dtype=dtype, device=device, packed=scheme is None)
        options.for_model(loaded.model, loaded.tokenizer)  # before it is quantized
        prepare(loaded, scheme, optimize=optimize)
        status = run(loaded.model, loaded.tokenizer, options, ready)
    else:
        from llmkern.integrations.ray import require as require_ray

        require_ray("--replicas", "serve")
        from llmkern.integrations.ray.run import run_replicas

        make = functools.partial(load_prepared, model, scheme, optimize=optimize, dtype=dtype, device=device)
        gpus = 1 if device.startswith("cuda") else 0
        counts = least_and_most("--replicas", replicas)
        status = run_replicas(make, options, counts, ready, cpus=cpus, gpus=gpus)
    if status:
        raise typer.Exit(status)
