"""The wheel holds every room, every file in it that is not Python, and every plug-in it names."""

import ast
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS: dict[str, Any] = PROJECT["tool"]["setuptools"]
ROOMS = (
    "agents",
    "commands",
    "core",
    "environments",
    "evidence",
    "judges",
    "loop",
    "recipes",
    "trainers",
)


def folder(package: str) -> Path:
    return ROOT.joinpath(*package.split(".")[1:])


def test_every_folder_with_python_is_a_listed_package() -> None:
    found = {"selfwright"}
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            found.add(".".join(("selfwright", *file.parent.relative_to(ROOT).parts)))
    assert found == set(SETUPTOOLS["packages"])


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_a_package_opens_with_a_docstring(package: str) -> None:
    assert ast.get_docstring(ast.parse((folder(package) / "__init__.py").read_text()))


def test_every_data_file_is_shipped() -> None:
    patterns: dict[str, list[str]] = SETUPTOOLS["package-data"]
    for package in SETUPTOOLS["packages"]:
        if package == "selfwright":
            continue  # The root also holds what is not for the wheel.
        shipped = {
            file for glob in patterns.get(package, []) for file in folder(package).glob(glob)
        }
        data = {
            file for file in folder(package).iterdir() if file.is_file() and file.suffix != ".py"
        }
        assert data <= shipped, f"package-data of {package} leaves out {data - shipped}"
    assert "py.typed" in patterns["selfwright"]
    rubrics = set((ROOT / "judges" / "rubrics").iterdir())
    assert rubrics == set(folder("selfwright.judges").glob(*patterns["selfwright.judges"]))


def test_every_entry_point_names_a_class_in_the_tree() -> None:
    for group, points in PROJECT["project"]["entry-points"].items():
        for name, target in points.items():
            module, _, attribute = target.partition(":")
            tree = ast.parse(folder(module).with_suffix(".py").read_text())
            classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
            assert attribute in classes, f"{group}: {name} = {target}"


def test_the_root_holds_no_other_python() -> None:
    assert {file.name for file in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = {
        wish.split("[")[0].split(">")[0]
        for group in (PROJECT["project"]["dependencies"], *extras)
        for wish in group
    }
    assert wanted - {"selfwright"} <= pinned
