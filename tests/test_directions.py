"""Imports run down: commands, then the wings, then core. And what is heavy is imported late."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WINGS = ("agents", "environments", "judges", "trainers")
MAY: dict[str, set[str]] = {
    "core": set(),
    "recipes": set(),
    **{wing: {"core"} for wing in WINGS},
    "commands": {"core", "recipes", *WINGS},
}
HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "pandas", "scipy")


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of each module of ours that ``file`` imports."""
    package = ("selfwright", *file.parent.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            # `from .. import trainers` imports what it names; `from ..core.types import Step` does
            # not, but has said enough in its base.
            yield from ((node.lineno, f"{base}.{name.name}") for name in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)


@pytest.mark.parametrize("room", MAY)
def test_imports_run_downwards(room: str) -> None:
    for file in (ROOT / room).rglob("*.py"):
        for line, name in imports(file):
            parts = name.split(".")
            if parts[0] != "selfwright" or parts[1].startswith("__"):
                continue
            where = f"{file.relative_to(ROOT)}:{line} imports {name}"
            assert parts[1] == room or parts[1] in MAY[room], where


@pytest.mark.parametrize("room", MAY)
def test_inside_the_package_imports_are_relative(room: str) -> None:
    for file in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] != "selfwright", f"{file}:{node.lineno}"


def loaded(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after ``code``."""
    code = f"{code}\nimport sys; print('LOADED', *{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_importing_selfwright_imports_nothing() -> None:
    assert not loaded("import selfwright") & {*HEAVY, "numpy", "pydantic", "rich", "typer", "yaml"}


def test_help_imports_nothing_heavy() -> None:
    shown = loaded("from selfwright.commands.cli import call\nassert call(['--help']) == 0")
    assert not shown & {*HEAVY, "numpy", "pyarrow", "rich", "yaml"}


def test_core_imports_nothing_heavy() -> None:
    modules = [f"selfwright.core.{file.stem}" for file in (ROOT / "core").glob("[a-z]*.py")]
    assert not loaded(f"import {', '.join(modules)}") & set(HEAVY)
