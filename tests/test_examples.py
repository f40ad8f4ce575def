"""The examples, as users have them: a package that pip installs, and worlds of plain code."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from selfwright.core.config import Fleet
from selfwright.core.store import read_trajectories
from selfwright.core.tasks import StoredTask
from selfwright.environments.contract import check, render

ROOT = Path(__file__).parents[1]
Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Python:
    """Runs this interpreter with the package installed, and leaves the environment as it was."""
    work = tmp_path_factory.mktemp("examples")
    left_out = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT / "examples", work / "source", ignore=left_out)
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
            [sys.executable, "-m", "selfwright", *arguments],
            env=environment,
            cwd=work,
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


@pytest.mark.method
def test_they_are_listed(python: Python) -> None:
    for kind, name, target in (
        ("environments", "higher_lower", "higher_lower.world:HigherLower"),
        ("judges", "brief", "higher_lower.judge:Brief"),
        ("trainers", "best_of_group", "higher_lower.trainer:BestOfGroup"),
    ):
        listed = json.loads(python("list", kind, "--json").stdout)
        assert listed[name] == {"target": target, "distribution": "higher-lower"}
        assert len(listed) > 1, "ours are there, too"


@pytest.mark.method
def test_options_are_checked_by_name(python: Python) -> None:
    done = python("check", "higher_lower", "-o", "environment.largset=9")
    assert done.returncode == 2
    said = "environment.largset: unknown key; did you mean 'largest'?\n"
    assert done.stderr == f"-o environment.largset=9: {said}"


@pytest.mark.method
def test_the_world_keeps_its_contract(python: Python) -> None:
    done = python("check", "higher_lower", "-o", "environment.largest=20", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["ok"], done.stdout
    looked = {one["name"]: one["outcome"] for one in told["checks"]}
    assert looked["snapshots"] == looked["expert"] == "ok"


@pytest.mark.method
def test_a_run_plays_judges_and_learns_with_them(python: Python, tmp_path: Path) -> None:
    recipe = str(ROOT / "examples" / "recipe.yaml")
    done = python("run", recipe, "-o", "iterations=1", "--output", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["base"]["tasks"] == result["final"]["tasks"] == 4
    first = tmp_path / "run" / "iterations" / "0000"
    metrics = json.loads((first / "metrics.json").read_text())
    assert metrics["train/examples"] > 0 and metrics["best_of_group/margin"] > 0
    stored = read_trajectories(first)
    assert {one.verdict.judge for one in stored} == {"brief"}
    for one in stored:
        task = one.trajectory.task
        assert isinstance(task, StoredTask) and json.loads(task.data)["hidden"] > 0
        solved, score = one.trajectory.success, one.verdict.score
        assert score is not None and (score > 0) == solved


def _plain(language: str, name: str = "worlds.md") -> str:
    """The world of that page in that language."""
    page = (ROOT / "docs" / name).read_text()
    (code,) = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    return code


def _keeps(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **where: object) -> None:
    monkeypatch.chdir(folder)
    fleet = Fleet.model_validate(where)
    report = asyncio.run(check(name, {"prize": "key"}, fleet, episodes=2, resets=5))
    assert report.ok, render(report)
    looked = {one.name: one.outcome for one in report.checks}
    assert looked["wire"] == looked["expert"] == "ok"


def test_a_world_of_plain_python_keeps_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "doors.py").write_text(_plain("python plain"))
    _keeps("doors:Doors", tmp_path, monkeypatch, python=sys.executable)


@pytest.mark.node
def test_a_world_in_node_keeps_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_far_ends import node

    (tmp_path / "doors.mjs").write_text(_plain("javascript"))
    _keeps("doors", tmp_path, monkeypatch, command=(node(), "doors.mjs"))


def test_a_far_end_by_the_page_alone_keeps_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "end.py").write_text(_plain("python least", "wire.md"))
    _keeps("echo", tmp_path, monkeypatch, command=(sys.executable, "end.py"))
