"""Ray: batch jobs over many workers, and servers whose number follows the load.

===========  =================================================================================================
file         what it holds
===========  =================================================================================================
batch        a job: slices out, answers in, each row once (Ray Data)
worker       what answers rows: the server's application, asked in its own process
files        jsonl, csv, parquet and OpenAI's batch format, in slices
deployment   the server as replicas behind a front (Ray Serve)
run          `llmkern serve --replicas`: from start to drained end
===========  =================================================================================================

Importing this package imports nothing of the extra `ray`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmkern.extras import need

if TYPE_CHECKING:
    from llmkern.integrations.ray.batch import run_batch as run_batch
    from llmkern.integrations.ray.deployment import deployment as deployment

__all__ = ["Machines", "cluster", "deployment", "require", "run_batch"]

_OBJECT_STORE = 256 << 20  # bytes; what travels is text


def require(what: str, part: str) -> None:
    """Raise ModuleNotFoundError, with what to install, where Ray's part `data` or `serve` is missing."""
    modules = {"data": ("ray", "pyarrow"), "serve": ("ray",)}[part]
    need(what, "ray", *modules)
    from llmkern.serve import require as require_server

    require_server()


@dataclass(frozen=True)
class Machines:
    """Machines of a cluster, and the CPUs of the smallest."""

    count: int
    cpus: int


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[Machines]:
    """Connect to the cluster at `address` or RAY_ADDRESS, or start one of this machine.

    A connection that is there is used, and kept.  Raises ConnectionError where no cluster answers.
    """
    import ray

    ours = not ray.is_initialized()
    if ours:
        # Nothing is reported to Ray's makers.  Its processes listen on every interface, whatever address they are
        # given: who connects to a cluster of this machine must have its token, unless RAY_AUTH_MODE says otherwise.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        address = address or os.environ.get("RAY_ADDRESS")
        if address is None:
            local: dict[str, Any] = {"address": "local", "_node_ip_address": "127.0.0.1", "include_dashboard": False}
            ray.init(object_store_memory=_OBJECT_STORE, **local, **quiet)
        else:
            try:
                ray.init(address=address, **quiet)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ConnectionError(f"--address is {address}, where no Ray cluster answers: {error}") from None
    try:
        alive = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        with_cpus = [int(cpus) for cpus in alive if cpus >= 1] or [1]
        yield Machines(len(with_cpus), min(with_cpus))
    finally:
        if ours:
            ray.shutdown()


def __getattr__(name: str) -> Any:
    homes = {"run_batch": "batch", "deployment": "deployment"}
    if name in homes:
        return getattr(import_module(f"{__name__}.{homes[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
