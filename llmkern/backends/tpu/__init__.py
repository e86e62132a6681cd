"""The Pallas kernels of `llmkern.jax` behind torch tensors, by DLPack: compiled for v5e, executed by the interpreter.

torch has a name for tensors on a TPU ("xla") but no such device beside a torch as new as llmkern needs: on CPU tensors
the kernels run where this backend is asked for by name, on the TPU that JAX has or in Pallas's interpreter.
JAX is imported by the first call, never with llmkern.
"""

from __future__ import annotations

import importlib.util

from llmkern.dispatch import register

DEVICE = "xla"
"""torch's type of device for TPUs."""
NOTE = "compiled for v5e, executed by the interpreter"
"""How far the kernels have been tried: no TPU has run them."""


def _missing() -> str | None:
    if importlib.util.find_spec("jax") is None:
        return "JAX is not installed; pip install jax (on a TPU VM: pip install 'jax[tpu]')"
    return None


TPU = register("tpu", priority=250, devices=(DEVICE, "cpu"), missing=_missing, note=NOTE)
