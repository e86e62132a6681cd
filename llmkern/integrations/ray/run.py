"""`llmkern serve --replicas`: Ray Serve from start to drained end."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from llmkern.integrations.ray import cluster
from llmkern.integrations.ray.deployment import deployment
from llmkern.integrations.ray.worker import Load
from llmkern.serve.options import ServeOptions
from llmkern.serve.port import bound_socket

__all__ = ["explained", "run_replicas", "serving_replicas"]

_NAME = "llmkern"


def run_replicas(
    load: Load,
    options: ServeOptions,
    replicas: tuple[int, int],
    ready: Callable[[str], None],
    *,
    cpus: int | None = None,
    gpus: float = 0,
) -> int:
    """Serve until SIGINT or SIGTERM, and return the exit status.

    ready: called with the server's URL when a replica takes requests.  A signal refuses what comes from then on and
    waits up to `options.timeout` for what runs; a second one ends that.  Raises as `serving_replicas`.
    """
    asked = threading.Event()
    serving = serving_replicas(load, options, replicas, cpus=cpus, gpus=gpus, hurry=asked)
    with contextlib.ExitStack() as signals, serving as url:
        signals.enter_context(_setting(asked))  # not sooner: `ray.init` takes SIGTERM for itself
        ready(url)
        asked.wait()
        asked.clear()
    return 0


@contextlib.contextmanager
def serving_replicas(
    load: Load,
    options: ServeOptions,
    replicas: tuple[int, int],
    *,
    cpus: int | None = None,
    gpus: float = 0,
    hurry: threading.Event | None = None,
    **autoscaling: Any,
) -> Iterator[str]:
    """Serve on this machine's Ray cluster, starting one if none runs; yields the URL.

    At the end new requests are refused, and what runs is waited for, up to `options.timeout` or until `hurry` is set.
    cpus: of each replica, None for an equal share of a machine.  autoscaling: as of `deployment`.
    Raises OSError if the port is taken, ValueError or RuntimeError if no replica can start, or if the cluster's Ray
    Serve is in use.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    port = _free_port(options)
    with cluster(None) as machines:
        if serve.status().proxies:  # ending ours would end the others' applications
            raise ValueError(
                "--replicas: Ray Serve runs on this cluster already; "
                "ray.serve.run(llmkern.integrations.ray.deployment(…)) adds an application to it"
            )
        share = cpus or max(1, machines.cpus // -(-replicas[1] // machines.count))
        application = deployment(load, options, replicas=replicas, cpus=share, gpus=gpus, **autoscaling)
        serve.start(
            http_options={"host": options.host, "port": port, "request_timeout_s": options.timeout + 60},
            logging_config={"log_level": "ERROR"},
        )
        try:
            try:
                handle = serve.run(application, name=_NAME, blocking=False)
            except RuntimeError as error:
                raise explained(serve, error) from error
            yield f"http://{options.host}:{port}"
            _drain(handle, options.timeout, hurry or threading.Event())
        finally:
            serve.shutdown()


def _free_port(options: ServeOptions) -> int:
    """Return the port, a free one for 0.  Raises OSError if it is taken: Ray would try again and again."""
    with bound_socket(options) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _setting(event: threading.Event) -> Iterator[None]:
    """Have SIGINT and SIGTERM set an event within the block."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {each: signal.signal(each, lambda *_: event.set()) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _drain(handle: Any, timeout: float, hurry: threading.Event) -> None:
    """Wait until the front has answered all that runs."""
    left = handle.drain.remote(timeout)
    while not hurry.is_set():
        with contextlib.suppress(TimeoutError):
            left.result(timeout_s=0.2)
            return


def explained(serve: Any, error: Exception) -> Exception:
    """Return the error with the last line that a replica said before it failed to start."""
    with contextlib.suppress(KeyError, IndexError):
        message = serve.status().applications[_NAME].deployments["Replica"].message
        line = [line.strip() for line in message.splitlines() if line.strip()][-1]
        kind, _, sentence = line.partition(": ")
        if kind in ("ValueError", "OSError", "ModuleNotFoundError"):
            return ValueError(sentence[:300])
        return RuntimeError(f"no replica started: {line[:300]}")
    return error
