"""`llmkern why`."""

from __future__ import annotations

from typing import Annotated, List, Optional  # noqa: UP035  (typer reads annotations at run time, on 3.10 too)

import typer

from llmkern.cli.arguments import dtype_named
from llmkern.cli.output import print_json
from llmkern.why import ops, sizes
from llmkern.why import why as decide

__all__ = ["epilog", "why"]


def why(
    op: Annotated[str, typer.Argument(metavar="OP", help="The op, one of those below.")],
    shape: Annotated[str, typer.Option(metavar="N,N,…", help="The sizes that the list below names for the op.")] = "",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda or tpu; it need not be here.")] = "cpu",
    capability: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="X.Y", help="Decide as on a GPU of this compute capability: 8.0, 9.0 …"),
    ] = None,
    chip: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="Decide as on a TPU of this kind: v4, v5e, v5p or v6e."),
    ] = None,
    grad: Annotated[bool, typer.Option("--grad", help="Decide for a call that needs a gradient.")] = False,
    arg: Annotated[
        Optional[List[str]],  # noqa: UP006, UP045
        typer.Option(metavar="NAME=VALUE", help="A further argument of the op; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Who would serve one call, and why not the others; nothing is computed.  Exit status 1 where nobody would.

    \b
    llmkern why rms_norm --shape 4096,8192 --dtype bfloat16
    llmkern why attention --shape 1,32,8,1,4096,128 --dtype bf16 --device cuda --capability 9.0
    llmkern why attention --shape 1,32,8,2048,2048,128 --dtype bf16 --device tpu --chip v5e --arg causal=true
    llmkern why attention --shape 2,8,8,512,512,64 --arg causal=true --arg window=128 --arg padding=true
    """
    decision = decide(
        op,
        _whole_numbers(op, shape),
        dtype=dtype_named(dtype),
        device=device,
        capability=None if capability is None else _capability(capability),
        chip=chip,
        grad=grad,
        arguments=dict(_pair(text) for text in arg or []),
    )
    if as_json:
        print_json(decision.to_dict())
    else:
        print(decision)
    if decision.served_by is None:
        raise typer.Exit(1)


def epilog() -> str:
    """The meaning of --shape, op by op."""
    width = max(len(op) for op in ops())
    return "\n".join(["\b", "--shape, by op:", *[f"  {op:{width}}  {','.join(sizes(op))}" for op in ops()]])


def _whole_numbers(op: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--shape is {text!r}, expected {','.join(sizes(op))} as whole numbers") from None


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        raise ValueError(f"--capability is {text!r}, expected major.minor such as 9.0")
    return int(major), int(minor)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--arg is {text!r}, expected NAME=VALUE such as causal=true")
    return name, value
