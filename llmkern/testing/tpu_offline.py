"""Compile what `llmkern.jax` launches for a TPU that is not here, and read what the compiler made of it.

libtpu, which JAX compiles with on a TPU VM, compiles for a described chip on any x86 machine.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llmkern.jax import assume
from llmkern.jax._plan import Plan

__all__ = ["TOPOLOGIES", "Compiled", "compiled", "lowered_for", "missing"]

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""The smallest slice of each chip, as libtpu names it."""
# What libtpu asks of a cloud VM's metadata.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Compiled:
    """A function compiled for one core of a chip.

    plans: the kernels that it launches.  vmem: bytes of VMEM that each kernel in the program takes, by the compiler.
    arguments, outputs, temporaries: bytes of HBM.
    """

    plans: tuple[Plan, ...]
    vmem: tuple[int, ...]
    arguments: int
    outputs: int
    temporaries: int

    def __str__(self) -> str:
        return (
            f"{self.arguments / 2**20:.0f} MiB of arguments, {self.temporaries / 2**20:.1f} MiB of temporaries, "
            f"{len(self.vmem)} kernels, at most {max(self.vmem, default=0) / 2**20:.2f} MiB of VMEM"
        )


def missing() -> str | None:
    """Return why nothing can be compiled here, or None."""
    for package, command in (("jax", "pip install jax"), ("libtpu", "pip install 'jax[tpu]'")):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed; {command}"
    return None


@contextmanager
def lowered_for(chip: str) -> Iterator[None]:
    """Lower kernels for `chip` within the block, by JAX alone."""
    from jax._src.pallas.mosaic import tpu_info

    # Some lowering rules ask for the chip at hand, and know of none on a CPU.
    before = tpu_info.registry.get("cpu")
    tpu_info.registry["cpu"] = lambda: tpu_info.get_tpu_info_for_chip(tpu_info.ChipVersion(chip), 1)
    try:
        with assume(chip):
            yield
    finally:
        if before is None:
            del tpu_info.registry["cpu"]
        else:
            tpu_info.registry["cpu"] = before


def compiled(chip: str, function: Callable[..., Any], *trees: Any) -> Compiled:
    """Compile `function(*trees)` for `chip`; trees have arrays or `jax.ShapeDtypeStruct`s as leaves.

    Raises ValueError where a kernel refuses the chip, and what libtpu raises where it cannot compile.
    """
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from llmkern.jax._launch import recorded

    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    sharding = SingleDeviceSharding(topologies.get_topology_desc(TOPOLOGIES[chip], "tpu").devices[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), trees)
    with lowered_for(chip):
        with recorded() as plans:
            traced = jax.jit(lambda *given: function(*given)).trace(*placed)  # anew, whatever was traced before
        program = traced.lower().compile()
    memory = program.memory_analysis()
    return Compiled(
        tuple(plans),
        tuple(_vmem(program.as_text())),
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
    )


def _vmem(text: str) -> Iterator[int]:
    """Yield the VMEM of each Pallas kernel in a compiled program."""
    for line in text.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            used = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', line)
            yield sum(int(size) for size in re.findall(r'"size":"(\d+)"', used[1])) if used else 0
