"""`llmkern bench serve`: one load on every server at hand."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import torch
import typer

from llmkern.cli.bench_results import Outputs, kept_on_interrupt, new_result, recorded
from llmkern.cli.models import DTYPE_HELP, load, token_ids
from llmkern.cli.models import HELP as MODEL_HELP
from llmkern.cli.output import say, working

if TYPE_CHECKING:
    from llmkern.bench.load import Measured
    from llmkern.bench.schema import Row

__all__ = ["serve"]


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    clients: Annotated[str, typer.Option(metavar="N,…", help="Clients that ask at a time.")] = "1,4,16",
    requests: Annotated[int, typer.Option(metavar="N", help="Requests of each client.")] = 2,
    prompt_len: Annotated[int, typer.Option(metavar="N", help="Tokens of each prompt, about.")] = 128,
    new_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of each answer, at most.")] = 64,
    url: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads annotations at run time, on 3.10 too)
        typer.Option(metavar="URL", help="A server that runs already, in place of those it would start; repeatable."),
    ] = None,
    api_key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="KEY", envvar="LLMKERN_API_KEY", help="For the servers of --url."),
    ] = None,
    only: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--servers", metavar="NAME,…", help="These servers; without, all that are there."),
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help=DTYPE_HELP)] = "float32",
    as_json: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--json", metavar="FILE", help="Write the result as JSON; - prints it in place of the table."),
    ] = None,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--plot", metavar="DIR", help="Write a PNG plot into this folder."),
    ] = None,
    record: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--record", metavar="DIR", help="Keep JSON and plot under DIR/results and DIR/plots, by device."),
    ] = None,
) -> None:
    """Put the same load on llmkern serve, transformers serve and llama.cpp's server, one after the other.

    Each client asks, reads the stream, and asks again.  Throughput counts generated tokens of all clients; first
    token and between tokens are what a client sees, queue included.  Serving is measured on the CPU.

    \b
    llmkern bench serve demo:smollm2 --clients 1,4,16
    llmkern bench serve demo:smollm2 --servers "llmkern int8" --url http://127.0.0.1:8000
    """
    from llmkern.serve import require

    require()
    from llmkern.bench.peer import Unsupported
    from llmkern.bench.servers import Running, Setting, running, servers

    counts = _counts(clients)
    for name, value in (("--requests", requests), ("--prompt-len", prompt_len), ("--new-tokens", new_tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    known = {server.name: server for server in servers()}
    chosen = list(known) if only is None else only.split(",")
    if url and only is None:
        chosen = []
    for name in chosen:
        if name not in known:
            raise ValueError(f"--servers has {name!r}, expected some of {', '.join(known)}")
    device = torch.device("cpu")
    as_json, plot = recorded(record, f"serve-{model}", device, as_json, plot)
    outputs = Outputs(as_json, plot, None)
    loaded = load(model, dtype=dtype, device="cpu")
    if loaded.tokenizer is None or not loaded.is_language_model:
        raise ValueError(f"MODEL {model} is no language model with a tokenizer, so it does not chat")
    prompts = _prompts(loaded, prompt_len, max(counts) * requests)
    folder = str(loaded.model.config._name_or_path or model)  # type: ignore[union-attr]
    # A chat template adds tokens of its own to a prompt.
    context = prompt_len + new_tokens + 128
    setting = Setting(model, folder, dtype, max(counts), context, torch.get_num_threads())
    del loaded
    result = new_result(device, {"absent_peers": {}, "left_out": [], "threads_of_servers": setting.threads})

    def put_load(name: str, server: Running) -> None:
        for count in counts:
            x = {"clients": count, "prompt_len": prompt_len, "new_tokens": new_tokens}
            with working(f"{name}: {count} clients"):
                found = _measured(server, prompts, count, count * requests, new_tokens, api_key)
            result.rows.extend(_rows(model, name, x, found, server.peak_memory))

    with kept_on_interrupt(result, outputs):
        for address in url or ():
            put_load(address, Running(address.rstrip("/").removesuffix("/v1"), _served_name(address, api_key), None))
        for name in chosen:
            if (reason := known[name].missing) is not None:
                result.environment["absent_peers"][name] = reason
                continue
            try:
                with working(f"starting {name}"), running(known[name], setting) as server:
                    put_load(name, server)
            except (Unsupported, RuntimeError) as error:
                say(str(error))
                result.environment["left_out"].append(f"{name}: {error}")


def _counts(clients: str) -> list[int]:
    parts = clients.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--clients is {clients!r}, expected whole numbers of at least 1")
    return [int(part) for part in parts]


def _prompts(loaded: Any, length: int, count: int) -> list[str]:
    """Pieces of prose of so many tokens; each begins in its own way, so that no server knows it from another."""
    ids = token_ids(loaded, length * count).tolist()
    texts = [loaded.tokenizer.decode(ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)]
    return [f"{i}. {texts[i % len(texts)]}" for i in range(count)]


def _served_name(address: str, api_key: str | None) -> str:
    """Return a running server's name for its model; raise ValueError if it does not answer."""
    from openai import OpenAI, OpenAIError

    try:
        with OpenAI(base_url=f"{address.rstrip('/').removesuffix('/v1')}/v1", api_key=api_key or "none") as client:
            return next(iter(client.models.list())).id
    except (OpenAIError, StopIteration) as error:
        raise ValueError(f"--url is {address}, which names no model: {error}") from None


def _measured(
    server: Any, prompts: Sequence[str], clients: int, requests: int, answer: int, api_key: str | None
) -> Measured:
    """The load, after one request that warms the server up."""
    from llmkern.bench.load import Load, measure

    asyncio.run(measure(server.url, Load(server.model, ["Hello"], 1, 1, 4, api_key)))
    return asyncio.run(measure(server.url, Load(server.model, prompts, clients, requests, answer, api_key)))


def _rows(model: str, provider: str, x: dict[str, Any], found: Measured, peak: int | None) -> list[Row]:
    from llmkern.bench.schema import Row

    detail = {"requests": len(found.answers), "errors": len(found.errors), "n": len(found.served)}
    error = f"{len(found.errors)} of {len(found.answers)} failed: {found.errors[0]}" if found.errors else None
    if not found.served:
        return [Row("serve", model, provider, "throughput_tokens_per_s", x, error=error, detail=detail)]
    rows = [
        Row("serve", model, provider, "throughput_tokens_per_s", x, p50=found.tokens_per_second, detail=detail),
        _spread(Row("serve", model, provider, "ttft_ms", x), found.ttft_ms),
        _spread(Row("serve", model, provider, "itl_ms", x), found.itl_ms),
    ]
    if peak is not None:
        rows.append(Row("serve", model, provider, "peak_memory_mb", x, p50=peak / 1e6))
    for row in rows:
        row.error = error
    return rows


def _spread(row: Row, values: list[float]) -> Row:
    """The row with percentiles; of one value all of them."""
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    if cuts:
        row.p20, row.p50, row.p80 = cuts[19], cuts[49], cuts[79]
        row.detail = {"n": len(values), "p90": cuts[89], "p99": cuts[98]}
    return row
