"""Servers of OpenAI's API to put a load on, each a process of its own: ours, and those that users would run instead."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from llmkern.bench.peer import Unsupported

__all__ = ["Running", "Server", "Setting", "running", "servers"]

_START_SECONDS = 300.0


@dataclass(frozen=True)
class Setting:
    """Settings of every server.  folder: the checkpoint on disk; context: tokens of a prompt and its answer."""

    model: str
    folder: str
    dtype: str
    clients: int
    context: int
    threads: int


@dataclass(frozen=True)
class Server:
    """A way to serve.  command: the arguments for a port; answers: a path that is 200 when it is ready.

    `command` raises Unsupported, with a sentence, for what it does not serve.
    """

    name: str
    missing: str | None
    command: Callable[[Setting, int], Sequence[str]]
    served_name: Callable[[Setting], str]
    answers: str = "/health"


@dataclass(frozen=True)
class Running:
    """A server that answers: its address, what requests call the model, and its process."""

    url: str
    model: str
    pid: int | None

    @property
    def peak_memory(self) -> int | None:
        """Return the process's peak of resident bytes, or None if the system does not say."""
        with contextlib.suppress(OSError, TypeError):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return None


def servers() -> list[Server]:
    """All, ours first."""

    def ours(name: str, *flags: str) -> Server:
        def command(setting: Setting, port: int) -> list[str]:
            sizes = ["--max-concurrent", str(setting.clients), "--max-context", str(setting.context)]
            start = [sys.executable, "-m", "llmkern", "serve", setting.model, "--port", str(port)]
            return [*start, "--dtype", setting.dtype, *sizes, *flags]

        return Server(name, None, command, lambda setting: setting.model)

    return [
        ours("llmkern"),
        ours("llmkern int8", "--quantize", "int8"),
        ours("llmkern serve --no-optimize", "--no-optimize"),
        Server("transformers serve", _missing("fastapi", "uvicorn"), _transformers, lambda setting: setting.folder),
        Server("llama.cpp Q8_0 (xllamacpp)", _missing("xllamacpp", "llama_cpp"), _llama_cpp, lambda setting: "any"),
    ]


@contextlib.contextmanager
def running(server: Server, setting: Setting) -> Iterator[Running]:
    """Start a server, wait until it answers, and end it.

    Raises RuntimeError, with the last line that it said, where it does not answer.
    """
    import httpx

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(setting.threads)}
    with tempfile.TemporaryFile("w+") as said:
        command = list(server.command(setting, port))
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + _START_SECONDS
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(url + server.answers, timeout=5, trust_env=False).status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > end:
                    said.seek(0)
                    lines = said.read().strip().splitlines() or ["it said nothing"]
                    raise RuntimeError(f"{server.name} did not start: {lines[-1][:300]}")
                time.sleep(0.2)
            yield Running(url, server.served_name(setting), process.pid)
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _missing(*packages: str) -> str | None:
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"{absent[0]} is not installed" if absent else None


def _transformers(setting: Setting, port: int) -> list[str]:
    # Without sizes its cache takes 60% of the memory, and a mask as wide slows every step down.
    pages = -(-setting.context // 256) * setting.clients
    options = ["--continuous-batching", "--cb-num-blocks", str(pages), "--cb-max-batch-tokens", "512"]
    start = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", setting.folder]
    return [*start, *options, "--device", "cpu", "--dtype", setting.dtype, "--host", "127.0.0.1", "--port", str(port)]


def _llama_cpp(setting: Setting, port: int) -> list[str]:
    from llmkern.bench.gguf_models import file_of

    spec = SimpleNamespace(model=setting.model, threads=setting.threads)
    program = f"""
import time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = {str(file_of(spec, "Q8_0"))!r}
params.n_ctx, params.n_parallel, params.n_batch = {setting.context * setting.clients}, {setting.clients}, 512
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = {setting.threads}
params.hostnames, params.port = ["127.0.0.1"], {port}
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
while True:
    time.sleep(60)
"""
    if setting.dtype != "float32":
        raise Unsupported("its weights are Q8_0 whatever the dtype; it is measured with float32's")
    return [sys.executable, "-c", program]
