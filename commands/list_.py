"""``selfwright list``: list what there is."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import PluginError
from .options import Json, emit


def list_(
    kind: Annotated[
        str, typer.Argument(help="recipes, environments, agents, policies, judges, ...")
    ],
    as_json: Json = False,
) -> None:
    """List recipes, or installed plug-ins."""
    from ..core.plugins import KINDS, names, nearest

    if kind not in (*KINDS, "recipes"):
        message = f"nothing to list is called {kind!r}; {nearest(kind, (*KINDS, 'recipes'))}"
        raise PluginError(message)
    found: dict[str, Any]
    if kind == "recipes":
        found = {name: {"about": _about(file)} for name, file in _shipped().items()}
    else:
        found = {
            name: {"target": one.target, "distribution": one.distribution}
            for name, one in names(kind).items()
        }
    width = max(map(len, found), default=0)
    lines = [
        f"{name:{width}}  {'  '.join(map(str, one.values()))}".rstrip()
        for name, one in found.items()
    ]
    emit(found, sys.stdout, None if as_json else "\n".join(lines) or f"no {kind}")


def _shipped() -> dict[str, Path]:
    from ..core.recipe import shipped

    return shipped()


def _about(file: Path) -> str:
    """The first comment line of a recipe."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("#")), "")
