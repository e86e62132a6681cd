"""`llmkern info`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmkern.cli.output import print_json

__all__ = ["info"]


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show hardware, versions, the native library, and each backend: available, or why not.

    \b
    llmkern info
    llmkern info --json | jq .backends
    """
    from llmkern.info import info as gather

    found = gather()
    if as_json:
        print_json(found.to_dict())
    else:
        print(found)
