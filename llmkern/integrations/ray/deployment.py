"""A server whose replicas follow the load (Ray Serve): a front that takes requests, and replicas that have the model.

The front passes each request on to a replica.  An answer that is not streamed comes whole from one replica; where that
replica dies meanwhile, another one is asked, so that the client sees nothing of it.  A stream whose replica dies after
its first piece ends with an error event: what was sent cannot be taken back.  The replicas are the server's
application, each in a process of its own, with its queue and its limits; Ray Serve starts, ends and replaces them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from llmkern.integrations.ray import require
from llmkern.integrations.ray.worker import Load
from llmkern.serve.options import ServeOptions

__all__ = ["deployment"]

_REPORT_EVERY = 1.0  # seconds
_STALE = 5.0  # seconds without a report: the replica has gone
_TRIES = 8
_LONGEST_PAUSE = 2.0  # seconds between two tries: together longer than Ray Serve takes to see that a replica is ill
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "upgrade", "te", "host"})


def deployment(
    load: Load,
    options: ServeOptions,
    *,
    replicas: tuple[int, int] = (1, 1),
    cpus: float = 1,
    gpus: float = 0,
    target_ongoing_requests: float | None = None,
    upscale_delay_s: float = 5.0,
    downscale_delay_s: float = 120.0,
    look_back_period_s: float = 10.0,
) -> Any:
    """Make a `ray.serve.Application` that serves OpenAI's API, for `ray.serve.run`.

    load: returns a model of transformers and its tokenizer; called in each replica.
    replicas: least and most, each with so many CPUs and GPUs; between them their number follows the requests that run
        and wait: `target_ongoing_requests` for each replica (None: `options.max_concurrent`), looked at over
        `look_back_period_s`, with the delays before one is added or ended.
    Raises ValueError for impossible numbers of replicas, ModuleNotFoundError without the extra `ray`.
    """
    require("a deployment", "serve")
    from ray import serve

    least, most = replicas
    if not 1 <= least <= most:
        raise ValueError(f"replicas is {least}..{most}, expected at least 1, and the most last")
    places = options.max_concurrent + options.max_queue
    replica = serve.deployment(
        name="Replica",
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        # The application queues, and refuses what is too much: Ray's own queue, which has no end, must stay empty.
        max_ongoing_requests=2 * places,
        max_constructor_retry_count=1,  # a model that does not load now does not load the next time either
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=options.timeout,
        autoscaling_config={
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": target_ongoing_requests or options.max_concurrent,
            "upscale_delay_s": upscale_delay_s,
            "downscale_delay_s": downscale_delay_s,
            "look_back_period_s": look_back_period_s,
            "metrics_interval_s": min(look_back_period_s / 2, 2.0),
        },
    )(Replica)
    front = serve.deployment(
        name="Front",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=options.timeout,
    )(Front)
    return front.bind(replica.bind(load, options, cpus), options)


class Replica:
    """The server's application with a model of its own."""

    def __init__(self, load: Load, options: ServeOptions, cpus: float) -> None:
        import torch

        from llmkern.serve.app import create_app

        torch.set_num_threads(max(int(cpus), 1))
        model, tokenizer = load()
        self.app = create_app(model, tokenizer, options)
        self._lifespan: Any = None
        self._starting = asyncio.Lock()
        self._reports: asyncio.Task[None] | None = None

    async def check_health(self) -> None:
        """Raise if it cannot serve.  Ray Serve calls this before the first request, and every few seconds."""
        await self._start()
        if self.app.state.engine.dead:
            raise RuntimeError("the model's worker has died")

    async def _start(self) -> None:
        async with self._starting:
            if self._lifespan is None:
                self._lifespan = self.app.router.lifespan_context(self.app)
                await self._lifespan.__aenter__()
                self._reports = asyncio.create_task(self._report())

    async def _report(self) -> None:
        """Tell the front about the load, as long as this replica lives."""
        from ray import serve

        context = serve.get_replica_context()
        while True:
            text = self.app.state.engine.metrics.text().decode()
            with contextlib.suppress(Exception):  # the front starts, or starts again: the next report follows
                front = serve.get_app_handle(context.app_name)
                await front.report.remote(context.replica_id.unique_id, text)
            await asyncio.sleep(_REPORT_EVERY)

    async def answer(
        self, method: str, path: str, query: bytes, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> AsyncIterator[Any]:
        """Yield status and headers, then pieces of the body; closing the iterator is hanging up."""
        await self._start()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
            "root_path": "",
            "headers": headers,
            "client": None,
            "server": None,
        }
        sent: asyncio.Queue[Any] = asyncio.Queue()
        rest = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if rest:
                return rest.pop()
            await asyncio.Event().wait()  # a client that goes cancels the whole

        async def run() -> None:
            try:
                await self.app(scope, receive, sent.put)
            finally:
                sent.put_nowait(None)

        running = asyncio.create_task(run())
        try:
            while (message := await sent.get()) is not None:
                if message["type"] == "http.response.start":
                    yield message["status"], list(message["headers"])
                elif message.get("body"):
                    yield message["body"]
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


class Front:
    """Server that Ray's HTTP proxy calls, one for all replicas."""

    def __init__(self, replica: Any, options: ServeOptions) -> None:
        self._replica, self._options = replica.options(stream=True), options
        self._loads: dict[str, tuple[float, str]] = {}
        self._running = self._retried = 0
        self._draining = False

    async def report(self, replica: str, metrics: str) -> None:
        """Note a replica's load, in the format of Prometheus."""
        self._loads[replica] = (time.monotonic(), metrics)

    async def drain(self, timeout: float) -> int:
        """Refuse what comes from now on, and wait for what runs; returns the requests that still do."""
        self._draining = True
        end = time.monotonic() + timeout
        while self._running and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return self._running

    async def __call__(self, request: Any) -> Any:
        from fastapi.responses import Response
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        from llmkern.serve.http import ApiError

        if self._draining:
            return ApiError(503, "the server is shutting down").response()
        if request.url.path == "/metrics" and request.method == "GET":
            return Response(self._metrics(), media_type="text/plain; version=0.0.4")
        body = await request.body()
        if len(body) > self._options.max_body:
            return ApiError(413, f"the body has more than {self._options.max_body} bytes").response()
        pieces = self._counted(self._pieces(request, body))
        try:
            status, headers = await anext(pieces)
        except (RayError, RayServeException) as error:
            return ApiError(503, f"no replica answers: {type(error).__name__}").response()
        return _answer(status, headers, pieces)

    async def _counted(self, pieces: AsyncIterator[Any]) -> AsyncIterator[Any]:
        self._running += 1
        try:
            async for piece in pieces:
                yield piece
        finally:
            self._running -= 1

    async def _pieces(self, request: Any, body: bytes) -> AsyncIterator[Any]:
        """Yield status and headers, then pieces of the body, from a replica that lives to the end of them."""
        from ray.exceptions import RayActorError

        headers = [(name, value) for name, value in request.headers.raw if name.decode("latin-1") not in _HOP_BY_HOP]
        for tried in range(1, _TRIES + 1):
            whole: list[Any] = []
            begun = False
            answer = self._replica.answer.remote(
                request.method, request.url.path, request.scope["query_string"], headers, body
            )
            try:
                async for piece in answer:
                    if begun or (not whole and _is_stream(piece)):
                        begun = True
                        yield piece
                    else:
                        whole.append(piece)
            except RayActorError:
                if begun:
                    yield _broken()
                    return
                if tried == _TRIES:
                    raise
            except (GeneratorExit, asyncio.CancelledError):  # the client has hung up
                answer.cancel()
                raise
            else:
                # A replica whose worker has died answers until Ray Serve replaces it.
                if begun or whole[0][0] != 503 or tried == _TRIES:
                    for piece in whole:
                        yield piece
                    return
            self._retried += 1
            await asyncio.sleep(min(0.1 * 2**tried, _LONGEST_PAUSE))

    def _metrics(self) -> bytes:
        """Return each replica's metrics with its name as a label, and those of the front."""
        from prometheus_client import CollectorRegistry, generate_latest

        now = time.monotonic()
        self._loads = {name: one for name, one in self._loads.items() if now - one[0] < _STALE}
        registry = CollectorRegistry()
        registry.register(_Merged(self._loads, self._running, self._retried))
        return generate_latest(registry)


class _Merged:
    """Prometheus collector over the replicas' reports."""

    def __init__(self, loads: dict[str, tuple[float, str]], running: int, retried: int) -> None:
        self._loads, self._running, self._retried = loads, running, retried

    def collect(self) -> Any:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
        from prometheus_client.parser import text_string_to_metric_families

        yield GaugeMetricFamily("llmkern:replicas", "Replicas that report.", len(self._loads))
        yield GaugeMetricFamily("llmkern:front_requests_running", "Requests that the front waits for.", self._running)
        yield CounterMetricFamily("llmkern:front_retries", "Requests asked again, their replica dead.", self._retried)
        merged: dict[str, Any] = {}
        for replica, (_, text) in self._loads.items():
            for family in text_string_to_metric_families(text):
                samples = [one._replace(labels={**one.labels, "replica": replica}) for one in family.samples]
                if family.name in merged:
                    merged[family.name].samples += samples
                else:
                    family.samples = samples
                    merged[family.name] = family
        yield from merged.values()


def _is_stream(first: tuple[int, list[tuple[bytes, bytes]]]) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in first[1])


def _broken() -> bytes:
    from llmkern.serve.http import ApiError, error_body

    error = error_body(ApiError(500, "the replica of this stream has died; what is missing was not generated"))
    return f"data: {json.dumps(error)}\n\n".encode()


def _answer(status: int, headers: list[tuple[bytes, bytes]], pieces: AsyncIterator[bytes]) -> Any:
    """Make a response with exactly these headers."""
    from fastapi.responses import StreamingResponse

    response = StreamingResponse(pieces, status)
    response.raw_headers = [(bytes(name), bytes(value)) for name, value in headers]
    return response
