"""``selfwright compare``: compare two evaluations."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, emit, stdout_for_results


def compare(
    a: Annotated[Path, typer.Argument(help="An evaluation's folder, or a run's.")],
    b: Annotated[Path, typer.Argument(help="The one that may be better.")],
    as_json: Json = False,
) -> None:
    """Compare two evaluations, paired by task."""
    with stdout_for_results() as stdout:
        from ..evidence.compare import compare, render

        result = compare(a, b)
        emit(result, stdout, None if as_json else render(result))
