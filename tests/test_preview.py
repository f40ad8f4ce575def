"""``selfwright prompt``: the very prompt of a run, before it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from components import SINGLE, played

from selfwright.commands.cli import call
from selfwright.commands.prompt import words
from selfwright.core.models.open import open_tokens
from selfwright.core.store import read_trajectories
from selfwright.core.store.schema import EPISODES


@pytest.fixture
def recipe(model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(SINGLE.replace("MODEL", str(model_folder("scratch"))))
    return file


def shown(capfd: pytest.CaptureFixture[str], *line: str) -> str:
    assert call(["prompt", *line]) == 0
    return capfd.readouterr().out


def test_it_is_what_the_run_asks(
    recipe: Path,
    tmp_path: Path,
    model_folder: Callable[[str], Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    # So many puzzles that none of the shots is a task of the run.
    react = ["agent.use=react", "agent.shots=2", "environment.numbers=4", "environment.largest=99"]
    given = [word for one in react for word in ("-o", one)]
    told = json.loads(shown(capfd, str(recipe), *given, "--answer", "--json"))
    tokens = open_tokens(str(model_folder("scratch")))
    played(recipe, [*react, "iterations=1"], tmp_path / "run")
    steps = [
        step
        for one in read_trajectories(tmp_path / "run" / "iterations" / "0000" / EPISODES)
        for step in one.trajectory.steps[:1]
    ]
    assert steps
    for step in steps:
        # All but the task at hand is the same.
        messages = [(one.role, one.text) for one in step.action.prompt.messages]
        mine = [(one["role"], one["text"]) for one in told["messages"]]
        assert messages[:5] == mine[:5] and len(messages) == len(mine) == 6
        ids = tokens.prompt(step.action.prompt)
        assert abs(len(ids) - told["tokens"]) < 10  # Their numbers differ in digits.
    assert told["text"].endswith("<|assistant|>") and told["messages"][-1]["text"] in told["text"]
    assert told["max_tokens"] == 8 and 0 < told["answer"]["tokens"] <= 8
    assert bool(told["answer"]["invalid"]) == (not told["answer"]["action"])


def test_it_is_for_reading_too(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = shown(capfd, str(recipe))
    told = json.loads(shown(capfd, str(recipe), "--json"))
    assert f"task: {told['task']}\nprompt: {told['tokens']} tokens, and up to 8" in text
    assert told["text"] in text and told["answer"] is None
    other = json.loads(shown(capfd, str(recipe), "--task", "1", "--json"))
    held = json.loads(shown(capfd, str(recipe), "--split", "test", "--json"))
    assert len({told["task"], other["task"], held["task"]}) == 3
    # A model that the run makes has no tokens yet.
    made = ["-o", "policy.model=scratch:32x1", "-o", "policy.warm_start={}"]
    assert "--- user\nMake" in shown(capfd, str(recipe), *made)
    assert call(["prompt", str(recipe), *made, "--answer"]) == 1
    assert "is made by the run, so there is nobody to ask" in capfd.readouterr().err


def test_nothing_of_it_steers_a_terminal() -> None:
    found = {"task": "t\x1b[2J", "text": "a\x07\nb", "tokens": 3, "max_tokens": 4, "answer": None}
    found["constraint"] = None
    assert words(found) == (
        "task: t\\x1b[2J\nprompt: 3 tokens, and up to 4 to answer\n---\na\\x07\nb\n---"
    )


def test_it_shows_what_an_answer_is_held_to(
    recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = [str(recipe), "-o", "agent.use=react", "-o", "policy.constrain=true"]
    text = shown(capfd, *line)
    assert "held to" in text and 'start:  "Action: " action' in text
    held = json.loads(shown(capfd, *line, "--answer", "--json"))
    assert held["constraint"]["choices"] == [] and "action: t0" in held["constraint"]["grammar"]
    assert json.loads(shown(capfd, str(recipe), "--json"))["constraint"] is None
