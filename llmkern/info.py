"""Capabilities of this machine, this installation and each backend."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmkern import _native, dispatch
from llmkern.table import render

__all__ = ["Info", "info", "package_version"]

# What the kernels of llmkern and of PyTorch look for, of the many flags that a CPU reports.
_CPU_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
)


@dataclass(frozen=True)
class Info:
    """The answer of `info()`; prints as tables, `to_dict()` is ready for JSON.

    hardware: cpu, cpu_cores (usable by this process's threads), cpu_flags, and one entry per GPU.
    software: versions of Python, torch, Triton, JAX, libtpu, transformers and llmkern; None if not installed.
    library: path, "loaded" or the reason why not, the CPU instruction set in use, and how it was built.
    backends: per backend, best first: `missing` (None if available), `note`, and the number of `ops` it implements.
    kernels: the CUDA kernels in the library, with what each takes of an SM; empty where they were not built.
    """

    hardware: dict[str, Any] = field(default_factory=dict)
    software: dict[str, str | None] = field(default_factory=dict)
    library: dict[str, Any] = field(default_factory=dict)
    backends: dict[str, dict[str, Any]] = field(default_factory=dict)
    kernels: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings, numbers and None."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        def text(value: Any) -> str:
            if isinstance(value, float):
                return f"{value:.0%}"
            return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value or "-")

        tables = [
            render(title, ("", ""), [(key.replace("_", " "), text(value)) for key, value in rows.items()])
            for title, rows in (("Hardware", self.hardware), ("Software", self.software), ("Library", self.library))
        ]
        rows = [
            (name, "; ".join(filter(None, (b["missing"] or "available", b["note"]))), b["ops"])
            for name, b in self.backends.items()
        ]
        tables.append(render("Backends, best first", ("backend", "state", "ops"), rows))
        if self.kernels:
            shown = ("function", "tile", "threads", "registers", "shared_bytes", "blocks_per_sm", "occupancy", "needs")
            cells = [[text(kernel[name]) for name in shown] for kernel in self.kernels]
            tables.append(render("CUDA kernels", [name.replace("_", " ") for name in shown], cells))
        return "\n\n".join(tables)


def _cpu() -> tuple[str, list[str]]:
    """The CPU's name and those of its flags that matter here."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags.update(value.split())
    return name, [flag for flag in _CPU_FLAGS if flag in flags]


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB, "
        f"{p.multi_processor_count} SMs"
        for p in properties
    ]


def package_version(package: str) -> str | None:
    """Return the installed package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def info() -> Info:
    """Describe hardware, versions, the native library, and each backend: available, or why not."""
    cpu, flags = _cpu()
    software = {name: package_version(name) for name in ("llmkern", "torch", "triton", "jax", "libtpu", "transformers")}
    ops = {
        b.name: {i.op for op in dispatch.ops() for i in dispatch.implementations(op) if i.backend is b}
        for b in dispatch.backends()
    }
    return Info(
        hardware={"cpu": cpu, "cpu_threads": torch.get_num_threads(), "cpu_flags": flags, "gpus": _gpus()},
        software={"python": platform.python_version(), **software},
        library={
            "path": str(_native.path()),
            "state": _native.reason() or "loaded",
            "cuda_part": _native.part_missing("CUDA") or "loaded",
            "cpu_isa": _native.cpu_isa(),
            **_native.build_info(),
        },
        backends={b.name: {"missing": b.missing, "note": b.note, "ops": len(ops[b.name])} for b in dispatch.backends()},
        kernels=_native.kernels() if _native.part_missing("CUDA") is None else [],
    )
