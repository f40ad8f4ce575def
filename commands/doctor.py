"""``selfwright doctor``: look at this machine."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, emit, make_display, stdout_for_results


def doctor(
    vllm_python: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="The Python that serves with vLLM; by default $SELFWRIGHT_VLLM_PYTHON, "
            ".venv-vllm here, or this one.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look for what is missing or at odds on this machine."""
    with stdout_for_results() as stdout:
        import asyncio

        from ..loop.doctor.doctor import doctor, to_json
        from ..loop.progress import Progress
        from .words import show_findings

        with Progress(make_display()).stage("looking at this machine"):
            findings = asyncio.run(doctor(vllm_python))
        result = to_json(findings)
        if as_json:
            emit(result, stdout, None)
        else:
            show_findings(findings, stdout)
    if not result["ok"]:
        raise typer.Exit(1)
