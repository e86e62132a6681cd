"""The ops suite on the TPU that JAX has: `llmkern.jax` and XLA's operators on arrays that are there already.

Inputs are drawn and results judged on the CPU.  A time is that of a whole call of a jitted function, its launch
included; the ceilings are those of the chip's table, not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from llmkern.backends.tpu import NOTE, TPU
from llmkern.backends.tpu._declare import TWINS, as_arrays, as_tensors
from llmkern.bench.ceilings import Ceilings
from llmkern.bench.peer import Peer
from llmkern.bench.run_ops import BASELINE, OURS, XLA, Contender
from llmkern.bench.sweep import Inputs, Point
from llmkern.bench.timers import Thunk
from llmkern.dispatch import implementation
from llmkern.jax import Chip, _chips

__all__ = ["chip_ceilings", "contenders", "missing", "ops_on_tpu"]


def missing() -> str | None:
    """Return why nothing can be measured here, or None."""
    reason = TPU.missing or _chips.no_tpu()
    return None if reason is None else f"{reason} (the kernels are {NOTE})"


def ops_on_tpu(names: Iterable[str]) -> list[str]:
    """Return the ops that the TPU backend implements."""
    return [name for name in names if name in TWINS]


def chip_ceilings(chip: Chip) -> Ceilings:
    """Return the chip's own rates; a product in fp32 is six in bf16."""
    rates = {"bfloat16": chip.bf16, "int8": chip.int8, "float32": chip.bf16 / 6}
    return Ceilings(chip.bandwidth, chip.bandwidth, {name: rate for name, rate in rates.items() if rate})


def contenders(point: Point, call: dict[str, Any], peers: Iterable[Peer]) -> list[Contender]:
    """Return the TPU's kernels, and XLA's operators if PyTorch's are asked for: no peer runs there."""
    from llmkern.bench.xla import BASELINES

    impl = implementation(point.op, TPU.name)
    try:
        note = impl.describe(None, **call) if impl.describe is not None else ""
    except ValueError as error:
        note = f"refused: {error}"
    found = [Contender(OURS, _prepare(TWINS[point.op]), note=note, as_tensors=as_tensors)]
    if point.op in BASELINES and BASELINE in [peer.name for peer in peers]:
        found.append(Contender(XLA, _prepare(BASELINES[point.op]), as_tensors=as_tensors))
    return found


def _prepare(function: Callable[..., Any]) -> Callable[[Inputs], Thunk]:
    """Jit `function` on arrays that are on the TPU before it is timed."""
    import jax

    def prepare(inputs: Inputs) -> Thunk:
        tensors = {name: value for name, value in inputs.call.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in inputs.call.items() if name not in tensors}
        arrays = as_arrays(tensors)
        jitted = jax.jit(lambda arrays: function(**arrays, **plain))
        return lambda: jax.block_until_ready(jitted(arrays))

    return prepare
