"""Native CPU kernels (csrc/cpu), vectorised for AVX-512, AVX2, NEON or whatever the CPU has, on torch's threads."""

from __future__ import annotations

from llmkern import _native
from llmkern.dispatch import register

CPU = register("cpu", priority=200, devices=("cpu",), missing=lambda: _native.part_missing("CPU"))
