"""Imports run down: commands, loop, wings, core; no circles. What is heavy is imported late."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WINGS = ("agents", "environments", "evidence", "judges", "trainers")
MAY: dict[str, set[str]] = {
    "core": set(),
    "recipes": set(),
    **{wing: {"core"} for wing in WINGS},
    "loop": {"core", "recipes", *WINGS},
    "commands": {"core", "recipes", *WINGS, "loop"},
}
FLOORS: dict[str, set[str]] = {
    "trainers/methods": {"trainers/parts", "trainers/learning"},
    "trainers/parts": {"trainers/learning"},
    "trainers/learning": set(),
}
"""Which folders of their own wing the files of a folder may import from."""
POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
PLUGINS = {
    ROOT.joinpath(*target.partition(":")[0].split(".")[1:]).with_suffix(".py")
    for group in ("agents", "environments", "judges", "policies", "trainers")
    for target in POINTS[f"selfwright.{group}"].values()
}
"""None imports another one."""
HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "pandas", "scipy")
FILES = [file for room in MAY for file in (ROOT / room).rglob("*.py")]


def package_of(file: Path) -> tuple[str, ...]:
    return ("selfwright", *file.parent.relative_to(ROOT).parts)


def file_of(module: str) -> Path | None:
    """Where a module of ours stands; None for what is no module."""
    place = ROOT.joinpath(*module.split(".")[1:])
    if place.with_suffix(".py").is_file():
        return place.with_suffix(".py")
    return place / "__init__.py" if (place / "__init__.py").is_file() else None


def imported(file: Path) -> Iterator[tuple[int, Path]]:
    """Line and file of each module of ours that ``file`` imports, wherever in it."""
    package = package_of(file)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = package[: len(package) - node.level + 1]
            base = ".".join((*above, *filter(None, [node.module])))
            for name in node.names:
                # `from .. import trainers` imports what it names; `from ..core.types import Step`
                # imports what it names it from.
                found = file_of(f"{base}.{name.name}") or file_of(base)
                if found and found != ROOT / "__init__.py":
                    yield node.lineno, found


def room_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downwards(file: Path) -> None:
    room, folder = room_of(file), str(file.parent.relative_to(ROOT))
    for line, other in imported(file):
        where = f"{file.relative_to(ROOT)}:{line} imports {other.relative_to(ROOT)}"
        assert room_of(other) == room or room_of(other) in MAY[room], where
        home = str(other.parent.relative_to(ROOT))
        if folder in FLOORS and room_of(other) == room:
            assert home == folder or home in FLOORS[folder], where
        assert not {file, other} <= PLUGINS, where


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {file: {other for _, other in imported(file)} - {file} for file in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = " -> ".join(str(file.relative_to(ROOT)) for file in reversed(error.args[1]))
        pytest.fail(circle)


@pytest.mark.parametrize("room", MAY)
def test_inside_the_package_imports_are_relative(room: str) -> None:
    for file in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] != "selfwright", f"{file}:{node.lineno}"


def test_nothing_but_the_command_line_imports_a_verb() -> None:
    folder = ROOT / "commands"
    cli = folder / "cli.py"
    verbs = {other for _, other in imported(cli)} & set(folder.iterdir()) - {folder / "options.py"}
    assert {file.stem.strip("_") for file in verbs} >= {"run", "evaluate", "list", "bench_methods"}
    users = {file for file in FILES for _, other in imported(file) if other in verbs}
    assert users == {cli}


def test_the_loop_prints_nothing() -> None:
    """It tells events. What a process says as it dies, to nobody but people, is another thing."""
    for file in (ROOT / "loop").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] != "rich", f"{file}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                where = str(file.relative_to(ROOT / "loop"))
                dying = where in ("process_group.py", "doctor/models.py")
                assert node.func.id != "print" or dying, f"{file}:{node.lineno}"


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
    modules = [
        ".".join((*package_of(file), file.stem)) for file in (ROOT / "core").rglob("[a-z]*.py")
    ]
    assert not loaded(f"import {', '.join(modules)}") & set(HEAVY)
