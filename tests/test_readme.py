"""What the README says, done."""

import asyncio
import re
import sys
from pathlib import Path

import pytest
import yaml

from selfwright.commands.cli import app
from selfwright.core.recipe import read, shipped
from selfwright.environments.contract import check, render

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_world_of_your_own_keeps_its_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (world,) = [block for block in blocks("python") if "class Parrot" in block]
    (tmp_path / "readme_parrot.py").write_text(world)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    report = asyncio.run(check("readme_parrot:Parrot", {}, episodes=3, resets=20))
    assert report.ok, render(report)


def test_the_recipe_is_one(tmp_path: Path) -> None:
    (recipe,) = blocks("yaml")
    (tmp_path / "readme.yaml").write_text(recipe)
    shown, whole = read(tmp_path / "readme.yaml"), read("quickstart")
    given = yaml.safe_load(recipe)
    # It is the quickstart, shortened: every key it shows has the value that is there.
    for key in ("iterations", "seed"):
        assert given[key] == getattr(whole, key)
    for key in ("environment", "trainer", "learner"):
        section, want = shown.dump()[key], whole.dump()[key]
        mine = {k: v for k, v in given[key].items()}
        assert section["use"] == want["use"]
        assert {k: float(v) if k == "learning_rate" else v for k, v in mine.items()} == {
            k: want[k] for k in mine
        }


def test_every_command_and_recipe_is_named() -> None:
    for command in app.registered_commands:
        name = command.name or (command.callback.__name__ if command.callback else "")
        assert f"selfwright {name}" in README
    for name in shipped():
        folder, slash, _ = name.rpartition("/")
        assert f"`{folder}{slash}`" in README if slash else f"`{name}`" in README
