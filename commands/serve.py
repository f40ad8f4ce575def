"""``selfwright serve``: serve an agent."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Overrides, emit, make_display, stdout_for_results


def serve(
    checkpoint: Annotated[
        str, typer.Argument(help="A run, an iteration's or other checkpoint, a model folder or id.")
    ],
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="The policy plug-in that runs it.")
    ] = "transformers",
    host: Annotated[str, typer.Option(help="Beyond loopback a token is required.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    token_env: Annotated[
        str, typer.Option(metavar="NAME", help="The environment variable with the token.")
    ] = "SELFWRIGHT_TOKEN",
    name: Annotated[
        str | None, typer.Option(help="What the model is called; by default as its folder.")
    ] = None,
    world: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="On the playground; may be given again."),
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where new adapters may come from; none else may."),
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="On which adapters are compared.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seeds worlds and comparisons.")] = 0,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy; by default as its recipe evaluates.")
    ] = None,
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Serve an agent over HTTP, with a playground."""
    with stdout_for_results() as stdout:
        import asyncio

        from ..loop.serve import Asked, serve

        asked = Asked(
            checkpoint,
            engine,
            host,
            port,
            token_env,
            name,
            tuple(world or ()),
            adapters,
            tasks,
            seed,
            temperature,
            tuple(override or ()),
        )
        result = asyncio.run(serve(asked, make_display()))
        emit(result, stdout, None if as_json else f"served {result['model']}")
