"""``selfwright run``: run a recipe."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Output, Overrides, emit, make_display, processes, stdout_for_results


def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of one that is shipped.")],
    override: Overrides = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Run a recipe, or resume its run; in several processes under `accelerate launch`."""
    import asyncio

    from ..core.recipe import read

    rank, size = processes()
    with stdout_for_results() as stdout:
        plan = read(recipe, override or ())
        if rank:
            from ..loop.process_group import follow

            return follow(plan)
        display = make_display()
        for note in plan.notes:
            display.say(f"note: {note}")
        from ..loop.events import each
        from ..loop.run import run
        from ..loop.trackers import Trackers

        listener = each(display, Trackers(display))
        whole = partial(run, plan, output or Path("runs") / plan.name, listener)
        if size > 1:
            from ..loop.process_group import lead

            result = lead(plan, whole)
        else:
            result = asyncio.run(whole())
        from .words import run_words

        emit(result, stdout, None if as_json else run_words(result))
