"""``selfwright evaluate``: evaluate a checkpoint."""

from typing import Annotated, Literal

import typer

from .options import Json, Output, Overrides, emit, make_display, stdout_for_results


def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A run's checkpoint, a model folder or hub id, `expert` or `random`."),
    ],
    environment: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The world; a run's checkpoint knows its own."),
    ] = None,
    split: Annotated[
        Literal["train", "validation", "test"], typer.Option(help="Which tasks.")
    ] = "test",
    tasks: Annotated[
        int | None, typer.Option(min=1, help="How many; by default as many as its recipe says.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seeds worlds and sampling.")] = 0,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy; by default as its recipe says.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Who scores; by default as its recipe says."),
    ] = None,
    override: Overrides = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Play a checkpoint and count its successes."""
    with stdout_for_results() as stdout:
        import asyncio

        from ..loop.evaluate import evaluate_checkpoint
        from .words import evaluation_words

        asked = (checkpoint, environment, override or (), split, tasks, seed, temperature)
        result = asyncio.run(evaluate_checkpoint(*asked, output, make_display(), judge))
        emit(result, stdout, None if as_json else evaluation_words(result))
