"""What verbs share: their common options, where they print, which process they are."""

import json
import math
import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer

if TYPE_CHECKING:
    from .console import Display

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "-o",
        "--override",
        metavar="KEY.PATH=VALUE",
        help="Set one key, such as trainer.use=imitation. May be given again.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else, to stdout.")
]
Output = Annotated[
    Path | None, typer.Option(metavar="DIR", file_okay=False, help="The folder to write to.")
]


def processes() -> tuple[int, int]:
    """This one's rank and how many there are, as launchers tell those that they start."""
    names = (
        ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
        ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    )
    rank, size = (next((os.environ[n] for n in some if n in os.environ), "") for some in names)
    return (int(rank), int(size)) if rank and size else (0, 1)


@contextmanager
def stdout_for_results() -> Generator[TextIO]:
    """Whatever else writes to stdout, native libraries and child processes too, goes to stderr."""
    sys.stdout.flush()
    kept, python_stdout = os.dup(1), sys.stdout
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        with open(kept, "w", -1, "utf-8", "backslashreplace", closefd=False) as results:
            yield results
    finally:
        sys.stdout = python_stdout
        os.dup2(kept, 1)
        os.close(kept)


def make_display() -> "Display":
    from rich.console import Console

    from .console import Display

    # Where nobody watches, a line stays one line, whatever its length.
    return Display(Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty()))


def emit(result: Mapping[str, Any], stdout: TextIO, text: str | None) -> None:
    """Print ``text``, or ``result`` as JSON if there is none."""
    print(json.dumps(finite(result), allow_nan=False) if text is None else text, file=stdout)


def finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null stands for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in cast("list[Any]", value)]
    return value
