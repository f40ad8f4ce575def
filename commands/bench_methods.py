"""``selfwright bench-methods``: compare methods."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Output, Overrides, emit, make_display, stdout_for_results


def bench_methods(
    recipes: Annotated[
        list[str], typer.Argument(help="Recipes that differ in trainer and learner only.")
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    against: Annotated[
        str,
        typer.Option(metavar="NAME", help="Whom the others must beat; by default imitation."),
    ] = "",
    override: Overrides = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Compare methods: same bases, same budget, every seed, against base and one another."""
    with stdout_for_results() as stdout:
        import asyncio

        from ..loop.bench import bench, planned, render
        from ..loop.events import each
        from ..loop.trackers import Trackers

        plans, display = planned(recipes, seeds, override or (), against), make_display()
        listener = each(display, Trackers(display))
        result = asyncio.run(bench(plans, output or Path("runs") / "bench-methods", listener))
        emit(result, stdout, None if as_json else render(result))
