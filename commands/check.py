"""``selfwright check``: check a world."""

from typing import Annotated

import typer

from .options import Json, Overrides, emit, stdout_for_results


def check(
    environment: Annotated[str, typer.Argument(help="A world's name, or module:Class.")],
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Test a world against its contract."""
    import asyncio

    from ..core.recipe import section

    with stdout_for_results() as stdout:
        world, fleet = section("environment", environment, override or ())
        from ..environments.contract import check, render

        report = asyncio.run(check(environment, world.config.model_dump(mode="json"), fleet))
        emit(report.to_json(), stdout, None if as_json else render(report))
    if not report.ok:
        raise typer.Exit(1)
