"""`llmkern tune`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

__all__ = ["epilog", "tune"]


def tune(
    op: Annotated[str, typer.Argument(metavar="OP", help="One of those below.")],
    device: Annotated[Literal["cuda", "cpu"], typer.Option("--device", help="What to tune for.")] = "cuda",
    into: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads annotations at run time, on 3.10 too)
        typer.Option("--into", metavar="FILE", help="On the CPU, the table to write."),
    ] = None,
) -> None:
    """Time an op on this device, and keep what is fastest for this user.

    On a GPU: the tile sizes of a Triton kernel.  On the CPU: the sizes at which the native kernel is not slower than
    PyTorch.  The table is a JSON file in LLMKERN_CACHE; delete it to return to the built-in one.

    \b
    llmkern tune int8_matmul
    llmkern tune swiglu --device cpu
    """
    if device == "cpu":
        return _tune_cpu(op, into)
    if into is not None:
        raise ValueError("tune: --into is for --device cpu; on a GPU the table is in LLMKERN_CACHE")
    import torch

    from llmkern.backends.triton import TRITON, interpreted
    from llmkern.backends.triton._configs import classes, tuned_path
    from llmkern.backends.triton._launch import target_of
    from llmkern.backends.triton._tune import tune as run

    classes(op)
    if TRITON.missing is not None or interpreted():
        raise ValueError(f"tune: {TRITON.missing or 'the interpreter has nothing to tune; unset TRITON_INTERPRET'}")
    from triton.testing import do_bench

    gpu = torch.device("cuda", torch.cuda.current_device())
    target = target_of(torch.empty(0, device=gpu))
    for tuned in run(op, target, gpu, do_bench):
        change = f"{tuned.before_time:.4f} → {tuned.best_time:.4f} ms"
        print(f"{op} {tuned.shape_class}: {change}  {tuned.best}")
    print(f"Written to {tuned_path(target)}")


def _tune_cpu(op: str, into: Path | None) -> None:
    import torch

    from llmkern.backends.cpu._speed import user_table
    from llmkern.backends.cpu._tune import tune as run
    from llmkern.bench.timers import clock_for

    clock = clock_for(torch.device("cpu"))

    def timer(call: Callable[[], Any]) -> float:
        return clock.sample([call], clock.calls([call]))

    path = into or user_table()
    for found in run(op, path, timer):
        taken = f"taken from {found.least or 0} elements" + (f" to {found.most}" if found.most else " on")
        speeds = " ".join([f"{size}:{speed:.2f}" for size, speed in found.speeds.items()])
        print(f"{found.name} {found.dtype}: {taken}  ({speeds})")
    print(f"Written to {path}")


def epilog() -> str:
    """The ops that have configurations."""
    from llmkern.backends.cpu._tune import tunable
    from llmkern.backends.triton._configs import DEFAULTS

    lists = {"Ops with configurations:": DEFAULTS, "On the CPU:": tunable()}
    return "\n".join(["\b", *[line for title, ops in lists.items() for line in (title, *[f"  {op}" for op in ops])]])
