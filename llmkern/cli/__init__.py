"""The command line: one module per command, each with the function of that name; everything slow is imported there.

Exit status: 0; 1 where `check` finds a model outside the rule; 2 for input that is not accepted; 3 for a failure of
llmkern itself.  Errors are one line on stderr; LLMKERN_DEBUG=1 adds the traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Optional

import typer

from llmkern.cli.command import Command
from llmkern.config import settings
from llmkern.dispatch import Refused, backend_named

__all__ = ["app", "main", "run"]

COMMANDS = ("info", "why", "check", "generate", "serve", "batch", "demo", "bench", "tune", "distill")
BAD_INPUT = (ValueError, TypeError, OSError, ModuleNotFoundError, Refused)
# typer carries click under one name or another; this is the class whose message is for the user.
_UsageError: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


app = typer.Typer(
    name="llmkern",
    help="""Hand-written kernels swapped into the transformer models people already run.

    \b
    llmkern info                                        what this machine can run, and why not the rest
    llmkern check demo:smollm2                          swap, compare with the original, undo
    llmkern generate demo:smollm2 --prompt "Why is the sky blue?"
    llmkern serve demo:smollm2 --quantize int8          OpenAI's API at http://127.0.0.1:8000
    llmkern batch demo:smollm2 questions.jsonl answers/ every row of a file once, by any number of workers
    llmkern why attention --shape 1,32,8,4096,4096,128 --dtype bfloat16 --device cuda --capability 9.0

    MODEL is a local folder, a Hugging Face name, demo:smollm2 or demo:minilm.
    Every command takes --help, and --json for output that programs read.
    """,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=_HELP,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from llmkern import __version__

        print(f"llmkern {__version__}")
        raise typer.Exit


@app.callback()
def options(
    backend: Annotated[
        Optional[str],  # noqa: UP045  (typer reads annotations at run time, on 3.10 too)
        typer.Option(metavar="NAME", help="Serve every call by this backend, or fail with its reason."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where no kernel backend can serve a call.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    if backend is not None:
        settings.backend = backend
    if settings.backend is not None:
        backend_named(settings.backend, "LLMKERN_BACKEND" if backend is None else "--backend")
    settings.strict = settings.strict or strict


for _name in COMMANDS:
    _module = importlib.import_module(f"llmkern.cli.{_name}")
    _epilog = _module.epilog() if hasattr(_module, "epilog") else None
    _command = getattr(_module, _name)
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_name)
    else:
        app.command(_name, cls=Command, epilog=_epilog, context_settings=_HELP)(_command)


def run(arguments: Sequence[str]) -> int:
    """Run the command line `arguments`; returns the exit status."""
    try:
        status = app(args=list(arguments), prog_name="llmkern", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except _UsageError as error:
        message = error.format_message()  # type: ignore[attr-defined]
        if message.startswith("Usage:"):  # no command at all: the help, which is no line
            print(message)
            return 2
        return _fail(error, message, 2)
    except (typer.Abort, KeyboardInterrupt):
        return _fail(None, "interrupted", 130)
    except BrokenPipeError:
        # Whoever read the output has gone; the interpreter would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except BAD_INPUT as error:
        return _fail(error, str(error), 2)
    except Exception as error:
        hint = "" if settings.debug else "; LLMKERN_DEBUG=1 shows where"
        return _fail(error, f"{type(error).__name__}: {error}{hint}", 3)


def _fail(error: BaseException | None, message: str, status: int) -> int:
    if error is not None and settings.debug:
        traceback.print_exception(error)
    print(f"llmkern: {' '.join(message.split())}", file=sys.stderr)
    return status


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))
