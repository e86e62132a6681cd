"""Launch kernels: turn a plan into `pallas_call`.  No other module does."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llmkern.jax._chips import current, interpret
from llmkern.jax._plan import Block, Plan
from llmkern.scoped import assigned

__all__ = ["launch", "planned", "recorded"]


class _State:
    plans: list[Plan] | None = None
    dry: bool = False


_state = _State()


@contextlib.contextmanager
def recorded(*, dry: bool = False) -> Iterator[list[Plan]]:
    """Collect the plan of every launch that is traced within the block in the list that it yields.

    dry: launches give zeros and are not refused.  What is traced then must be forgotten: jit remembers by function.
    """
    found: list[Plan] = []
    with assigned(_state, plans=found, dry=dry):
        yield found


def planned(function: Callable[..., Any]) -> Callable[..., Any]:
    """Jit `function` for the current chip: keyword arguments are static, `chip` and `interpreted` are added."""
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    jitted = jax.jit(function, static_argnames=names)

    @functools.wraps(function)
    def call(*arrays: Any, **static: Any) -> Any:
        run = jitted if _state.plans is None else function  # jit does not trace again what it has cached
        return run(*arrays, **static, chip=current(), interpreted=interpret())

    return call


def launch(
    kernel: Callable[..., None], plan: Plan, arrays: Mapping[str, Array], interpreted: bool
) -> tuple[Array, ...]:
    """Run `kernel` over the plan's grid; returns the plan's outputs.

    kernel: takes a reference for each block of the plan, by name.  arrays: the inputs and what is prefetched, by name.
    Raises ValueError where the chip cannot run the plan.
    """
    if _state.plans is not None:
        _state.plans.append(plan)
    if _state.dry:
        return tuple([jnp.zeros(block.shape, block.dtype) for block in plan.outputs])
    reason = plan.refusal()
    if reason is not None:
        raise ValueError(reason)
    order = [block.name for block in (*plan.prefetch, *plan.inputs, *plan.outputs, *plan.scratch)]

    def body(*references: Any) -> None:
        kernel(**dict(zip(order, references, strict=True)))

    call = pl.pallas_call(
        body,
        name=plan.kernel,
        out_shape=tuple([jax.ShapeDtypeStruct(block.shape, block.dtype) for block in plan.outputs]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan.prefetch),
            grid=plan.grid,
            in_specs=[_spec(block) for block in plan.inputs],
            out_specs=tuple([_spec(block) for block in plan.outputs]),
            scratch_shapes=[pltpu.VMEM(block.block, jnp.dtype(block.dtype)) for block in plan.scratch],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=plan.semantics, vmem_limit_bytes=plan.chip.budget),
        interpret=interpreted,
    )
    forward = jax.custom_jvp(lambda *given: call(*given))

    @forward.defjvp
    def no_gradient(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"{plan.kernel} has no gradient: stop_gradient its inputs, or use JAX's own operators"
        )

    return forward(*[arrays[block.name] for block in (*plan.prefetch, *plan.inputs)])


def _spec(block: Block) -> pl.BlockSpec:
    if block.memory == "smem":
        return pl.BlockSpec(memory_space=pltpu.SMEM)
    return pl.BlockSpec(block.block, block.index)
