"""``selfwright prompt``: see what a model would be asked."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .options import Json, Overrides, emit, stdout_for_results


def prompt(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe file, or the name of one that comes with selfwright.")
    ],
    split: Annotated[
        Literal["train", "validation", "test"], typer.Option(help="Of which tasks.")
    ] = "train",
    task: Annotated[
        int, typer.Option(min=0, help="Which of those that the recipe's seed draws.")
    ] = 0,
    answer: Annotated[bool, typer.Option("--answer", help="Ask the model, once.")] = False,
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Show what a model would be asked, before anything runs."""
    import asyncio

    with stdout_for_results() as stdout:
        from ..core.recipe import read
        from ..loop.preview import preview

        found = asyncio.run(preview(read(recipe, override or ()), split, task, answer))
        emit(found, stdout, None if as_json else words(found))


def words(found: dict[str, Any]) -> str:
    """For reading: the very text that a model reads, or the messages if it is not known yet."""
    lines = [f"task: {found['task']}"]
    if found["text"] is None:
        lines.append("the run makes its model, so how many tokens these are is not known yet")
        for message in found["messages"]:
            pictures = f" ({message['images']} images)" if message["images"] else ""
            lines.append(f"--- {message['role']}{pictures}\n{message['text']}")
    else:
        lines.append(f"prompt: {found['tokens']} tokens, and up to {found['max_tokens']} to answer")
        lines.append(f"---\n{found['text']}\n---")
    if held := found["constraint"]:
        choices = held["choices"]
        lines.append(f"held to one of {choices}" if choices else f"held to\n{held['grammar']}\n---")
    if given := found["answer"]:
        read_as = given["action"] or f"no action: {given['invalid']}"
        lines.append(f"answer: {given['text']!r} ({given['tokens']} tokens, {given['finish']})")
        lines.append(f"read as: {read_as}")
    # What worlds and models say must not steer a terminal.
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in "\n".join(lines))
