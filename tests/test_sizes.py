"""No file of the package is over 500 lines, no function over 60: a screen each."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("agents", "commands", "core", "environments", "evidence", "judges", "loop", "trainers")
FILE, FUNCTION = 500, 60


def too_long(file: Path) -> set[str]:
    text, name = file.read_text(), str(file.relative_to(ROOT))
    found = {name} if len(text.splitlines()) > FILE else set[str]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno
            if node.end_lineno - node.lineno + 1 > FUNCTION:
                found.add(f"{name}:{node.name}")
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_screen_each(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    found = {one for file in files for one in too_long(file)}
    assert not found, "split it along what it is made of"
