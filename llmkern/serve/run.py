"""Run the server process: socket, signals, exit status."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from torch import nn

from llmkern.serve.app import create_app
from llmkern.serve.options import ServeOptions
from llmkern.serve.port import bound_socket

__all__ = ["run"]

_GRACE = 2.0  # seconds for the answers of a dead worker's requests, and for a probe that asks


def run(model: nn.Module, tokenizer: Any, options: ServeOptions, ready: Callable[[str], None]) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status, 1 where the worker has died.

    ready: called with the server's URL when it takes requests.
    A signal closes the socket; requests that run are answered (up to `options.timeout`), and a second signal ends
    them.  Raises OSError where the port is taken.
    """
    # Bound first: a port that is taken is known before the model is warm.
    with contextlib.closing(bound_socket(options)) as listening:
        app = create_app(model, tokenizer, options)
        gc.freeze()  # modules and the model stay: collections that walk them would be pauses between tokens
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=int(options.timeout) + 1,
            server_header=False,
        )
        server = _Server(config)
        host = f"[{options.host}]" if listening.family == socket.AF_INET6 else options.host
        url = f"http://{host}:{listening.getsockname()[1]}"
        return asyncio.run(_until_end(server, app.state.engine, listening, lambda: ready(url)))


async def _until_end(server: _Server, engine: Any, listening: socket.socket, ready: Callable[[], None]) -> int:
    serving = asyncio.create_task(server.serve([listening]))
    died = asyncio.create_task(engine.died.wait())
    try:
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        if server.started:
            ready()
        await asyncio.wait((serving, died), return_when=asyncio.FIRST_COMPLETED)
        dead = died.done()
        if not serving.done():
            await asyncio.sleep(_GRACE)
            server.should_exit = server.force_exit = True
        await serving
    finally:
        died.cancel()
        await engine.stop()  # a second signal leaves out what a first one would have waited for
    return 1 if dead or not server.started else 0


class _Server(uvicorn.Server):
    """uvicorn's server, whose process ends with a status of its own instead of the signal that asked it to."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {each: signal.signal(each, self.handle_exit) for each in signals}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
