"""Names are the field's: a name that was given up for a better one does not come back."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("agents", "commands", "core", "environments", "evidence", "judges", "loop", "trainers")
# What each gave way to: a value is called by what it is (payload, completion, message, instance),
# `means` is the context, `called` a player's name, `seat` a batch slot. `_said` is `said` too.
VALUES = {"told", "said", "made", "cast", "means", "called", "seat", "hire", "crew", "examine"}
CLASSES = {"Cast", "Crew", "Hire", "Ahead", "Exam", "Desk", "Shelf", "Patient", "Post", "Outpost"}
GIVEN_UP = VALUES | CLASSES


def named(node: ast.AST) -> Iterator[str]:
    """The names that a node gives. Others' names are used as they are, `typing.cast` among them."""
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            yield name
        case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
            yield name
        case ast.Attribute(attr=name, ctx=ast.Store()):
            yield name
        case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            yield name
        case ast.MatchMapping(rest=str(name)) | ast.ExceptHandler(name=str(name)):
            yield name
        case ast.ImportFrom(module="typing", names=names):
            yield from (one.asname for one in names if one.asname)
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            yield from (one.asname or one.name for one in names)
        case _:
            pass


def given_up(source: str) -> set[str]:
    """The names in ``source`` that are, underscores before and after aside, among ``GIVEN_UP``."""
    every = {name.strip("_") for node in ast.walk(ast.parse(source)) for name in named(node)}
    return every & GIVEN_UP


@pytest.mark.parametrize("room", ROOMS)
def test_what_was_renamed_stays_so(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    found = {str(file.relative_to(ROOT)): given_up(file.read_text()) for file in files}
    assert not {file: names for file, names in found.items() if names}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("told = 1", "told"),
        ("told: int = 1", "told"),
        ("a, *told = b", "told"),
        ("if told := b: pass", "told"),
        ("for told in b: pass", "told"),
        ("[b for told in b]", "told"),
        ("with b as told: pass", "told"),
        ("try: pass\nexcept OSError as told: pass", "told"),
        ("def f(*told): pass", "told"),
        ("lambda told: 0", "told"),
        ("a.told = 1", "told"),
        ("class A:\n    _told: int = 0", "told"),
        ("async def _told(): pass", "told"),
        ("class Desk: pass", "Desk"),
        ("match b:\n    case {'a': int(told), **said}: pass", "told"),
        ("match b:\n    case [*told]: pass", "told"),
        ("import b as told", "told"),
        ("from b import told", "told"),
        ("cast = 1", "cast"),
        ("from b import cast", "cast"),
    ],
)
def test_every_way_to_give_a_name_is_looked_at(source: str, name: str) -> None:
    assert name in given_up(source)


@pytest.mark.parametrize(
    "source",
    [
        "from typing import cast\na = cast(int, b)",
        "a = {'told': 1}['told']  # told",
        "def f():\n    'What was told.'",
        "untold = told_of = 1",
        "array.cast(1, means=2)",
    ],
)
def test_words_are_free(source: str) -> None:
    assert not given_up(source)
