"""A world that lives in a package of its own, installed with pip, is used by its name."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from selfwright.core.store import read_trajectories

pytestmark = pytest.mark.method

SOURCE = Path(__file__).parent / "plugin_world"
RECIPE = """
iterations: 1
environment: {use: parrot}
policy:
  model: scratch:32x1
  max_tokens: 4
  warm_start: {updates: 4, batch_size: 4, demonstrations: 4}
trainer: {use: imitation, tasks_per_iteration: 4}
learner: {rank: 4, alpha: 8}
evaluation: {tasks: 2, every: 0}
"""
Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Python:
    """Runs this interpreter with the package installed, and leaves the environment as it was."""
    work = tmp_path_factory.mktemp("parrot")
    shutil.copytree(SOURCE, work / "source", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target"]
    install = [sys.executable, "-m", "pip", "install", *options, work / "site", work / "source"]
    subprocess.run(install, check=True, timeout=240)
    paths = [str(work / "site"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "SELFWRIGHT_CACHE": str(work / "cache"),
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            cwd=work,
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


def test_it_is_listed(python: Python) -> None:
    done = python("-m", "selfwright", "list", "environments", "--json")
    listed = json.loads(done.stdout)
    assert listed["parrot"] == {
        "target": "parrot_world:Parrot",
        "distribution": "selfwright-parrot",
    }
    assert "countdown" in listed


def test_its_options_are_checked_by_name(python: Python) -> None:
    done = python("-m", "selfwright", "check", "parrot", "-o", "environment.lod=true")
    assert done.returncode == 2
    said = "-o environment.lod=true: environment.lod: unknown key; did you mean 'loud'?\n"
    assert done.stderr == said


def test_a_recipe_uses_it(python: Python) -> None:
    code = (
        "from selfwright.core.recipe import section\n"
        "world, fleet = section('environment', 'parrot', ['environment.parallel=2'])\n"
        "print(world.dump(), fleet.parallel, type(world.make()).__name__)"
    )
    done = python("-c", code)
    assert done.stdout == "{'use': 'parrot', 'loud': False} 2 Parrot\n", done.stderr


def test_a_run_plays_it_judges_it_and_learns_from_it(python: Python, tmp_path: Path) -> None:
    (tmp_path / "parrot.yaml").write_text(RECIPE)
    output = tmp_path / "run"
    done = python("-m", "selfwright", "run", str(tmp_path / "parrot.yaml"), "--output", str(output))
    assert done.returncode == 0, done.stderr
    result = json.loads((output / "result.json").read_text())
    assert result["base"]["tasks"] == result["final"]["tasks"] == 2
    assert result["tokens_trained"] > 0
    stored = read_trajectories(output / "iterations" / "0000")
    assert sorted(one.trajectory.task.id for one in stored) == [f"parrot {w}" for w in "abcd"]
    assert all(one.trajectory.success and one.verdict.score == 1 for one in stored)
