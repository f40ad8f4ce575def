"""What the README says, done."""

import asyncio
import re
import sys
from pathlib import Path

import pytest

from selfwright.commands.cli import app
from selfwright.core.plugins import names
from selfwright.environments.contract import check, render

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_a_world_in_twenty_lines_keeps_its_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (world,) = [block for block in blocks("python") if "class Parrot" in block]
    assert len([line for line in world.splitlines() if line.strip()]) <= 20
    (tmp_path / "readme_parrot.py").write_text(world)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    report = asyncio.run(check("readme_parrot:Parrot", {}, episodes=3, resets=20))
    assert report.ok, render(report)


def test_it_stays_short() -> None:
    assert len(README.splitlines()) <= 140


def test_every_command_is_named() -> None:
    for command in app.registered_commands:
        name = command.name or (command.callback.__name__ if command.callback else "")
        assert f"selfwright {name}" in README


def test_every_target_of_make_that_is_named_is_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z]+)", README, re.MULTILINE))
    assert {"demo", "check", "test"} <= named <= targets


def test_what_the_demo_prints_is_what_it_printed() -> None:
    said = (ROOT / "benchmarks" / "results" / "demo.txt").read_text().splitlines()
    (shown,) = [block for block in blocks("") if "test tasks solved" in block]
    lines = [line for line in shown.splitlines() if line != "..."]
    assert len(lines) > 3 and all(line in said for line in lines)


def test_every_trainer_is_named() -> None:
    for name, one in names("trainers").items():
        assert not one.target.startswith("selfwright.") or f"`{name}`" in README
