"""`llmkern tune`."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["epilog", "tune"]


def tune(
    op: Annotated[str, typer.Argument(metavar="OP", help="One of those below.")],
) -> None:
    """Time the tile sizes of a Triton kernel on this GPU, and keep the fastest for this user.

    The table is a JSON file in LLMKERN_CACHE, for this device, Triton and llmkern; delete it to return to the
    built-in one.

    \b
    llmkern tune int8_matmul
    """
    import torch

    from llmkern.backends.triton import TRITON, interpreted
    from llmkern.backends.triton._configs import classes, tuned_path
    from llmkern.backends.triton._launch import target_of
    from llmkern.backends.triton._tune import tune as run

    classes(op)
    if TRITON.missing is not None or interpreted():
        raise ValueError(f"tune: {TRITON.missing or 'the interpreter has nothing to tune; unset TRITON_INTERPRET'}")
    from triton.testing import do_bench

    device = torch.device("cuda", torch.cuda.current_device())
    target = target_of(torch.empty(0, device=device))
    for tuned in run(op, target, device, do_bench):
        change = f"{tuned.before_time:.4f} → {tuned.best_time:.4f} ms"
        print(f"{op} {tuned.shape_class}: {change}  {tuned.best}")
    print(f"Written to {tuned_path(target)}")


def epilog() -> str:
    """The ops that have configurations."""
    from llmkern.backends.triton._configs import DEFAULTS

    return "\n".join(["\b", "Ops with configurations:", *[f"  {op}" for op in DEFAULTS]])
