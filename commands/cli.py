"""The command line. Imports of weight stand inside the commands, so that ``--help`` is instant."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from ..core.errors import (
    DiskError,
    ModelError,
    PluginError,
    RecipeError,
    SelfwrightError,
    StoreError,
)
from ..core.unicode import no_unicode
from . import bench_methods, check, compare, doctor, evaluate, list_, prompt, run, serve
from .options import processes

BAD_INPUT = (RecipeError, PluginError, ModelError, StoreError)
"""Faults of what was typed or of the files it names: exit code 2."""

app = typer.Typer(
    help="Agents that improve themselves, and prove it.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The ``selfwright`` command."""
    sys.exit(call(sys.argv[1:]))


def call(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    0 is success; 1 a run or a check that failed; 2 a bad recipe, file or command line; 130 an
    interrupt. Only faults nobody foresaw leave as exceptions.
    """
    for argument in arguments:
        if fault := no_unicode(argument):
            # Paths and names are kept with results, as UTF-8.
            print(f"selfwright: {argument!a} is not in UTF-8: {fault}", file=sys.stderr)
            return 2
    try:
        code = app(list(arguments) or ["--help"], "selfwright", standalone_mode=False)
    except typer.TyperException as error:
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        print(f"selfwright: {message}; selfwright --help tells more", file=sys.stderr)
        return error.exit_code
    except SelfwrightError as error:
        rank, size = processes()
        where = f"process {rank} of {size}: " if rank else ""
        print(where + (str(error) or type(error).__name__), file=sys.stderr)
        return 2 if isinstance(error, BAD_INPUT) and not isinstance(error, DiskError) else 1
    except KeyboardInterrupt:
        code = 130
    if code == 130:
        print("selfwright: interrupted", file=sys.stderr)
    return int(code or 0)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"selfwright {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    _, size = processes()
    if size > 1 and context.invoked_subcommand not in ("run", None):
        raise RecipeError(
            f"{context.invoked_subcommand} works in one process, not in {size}; start it without "
            "accelerate launch"
        )


for name, verb in {
    "run": run.run,
    "evaluate": evaluate.evaluate,
    "serve": serve.serve,
    "check": check.check,
    "prompt": prompt.prompt,
    "compare": compare.compare,
    "bench-methods": bench_methods.bench_methods,
    "doctor": doctor.doctor,
    "list": list_.list_,
}.items():
    app.command(name)(verb)
