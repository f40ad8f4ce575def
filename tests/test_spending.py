"""A budget is spent and not exceeded, whatever a method plays and whenever a run is resumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from components import SINGLE, episode, played
from hypothesis import given
from hypothesis import strategies as st

from selfwright.core.config import Budget
from selfwright.core.types import Start, Step, Task
from selfwright.loop.spending import Costs, costs_of, covered

LIKE = [episode(0.0, ("o", "a"), ("p", "b")), episode(1.0, ("o", "a"))]
"""Three actions of a token each in two episodes."""


def begun(tasks: int, attempts: int, replayed: int = 0, turns: int | None = None) -> list[Start]:
    prefix: tuple[Step, ...] = LIKE[0].trajectory.steps[:1] * replayed
    return [
        Start(Task(f"t{k}", "", 3), 0, attempt, prefix, turns)
        for k in range(tasks)
        for attempt in range(attempts)
    ]


def test_costs_by_hand() -> None:
    assert costs_of(LIKE, asked=5.0) == Costs(3, 8)
    assert costs_of([episode(0.0, ("o", "a"), ("p", "b"), replayed=1)]) == Costs(2, 1)
    assert Costs(1, 2).and_more(Costs(3, 5), 2) == Costs(7, 12)


def test_episodes_begin_while_the_budget_is_not_spent() -> None:
    def count(budget: Budget, starts: list[Start], asks: bool = True) -> int:
        spent = Costs(10, 10)
        return len(covered(starts, spent, budget, LIKE, asks))

    # Two replayed and one new: three steps each, six a group; 10, 16 and 22 are less than 23.
    mends = begun(9, 2, replayed=2, turns=1)
    assert count(Budget(environment_steps=23), mends) == 6
    assert count(Budget(environment_steps=22), mends) == 4
    # Played to their ends: one and a half of an action, and of a token, on average; three a group.
    whole = begun(9, 2)
    assert count(Budget(environment_steps=20), whole) == count(Budget(tokens=20), whole) == 8
    assert count(Budget(environment_steps=20, tokens=12), whole) == 2
    # Never more than the task has left; who samples nothing costs no tokens.
    assert count(Budget(environment_steps=20), begun(9, 1, replayed=3)) == 4
    assert count(Budget(tokens=11), whole, asks=False) == len(whole)
    assert count(Budget(tokens=10), whole, asks=False) == 0
    assert count(Budget(), whole) == len(whole)
    # Where nothing is known yet: an action each.
    assert len(covered(whole, Costs(), Budget(environment_steps=5), (), True)) == 6


@given(st.integers(1, 200), st.integers(0, 40), st.integers(1, 9), st.integers(1, 5))
def test_at_most_one_group_goes_beyond(limit: int, spent: int, tasks: int, attempts: int) -> None:
    starts = begun(tasks, attempts, replayed=1, turns=1)
    kept = covered(starts, Costs(spent), Budget(environment_steps=limit), LIKE, True)
    assert kept == starts[: len(kept)] and len(kept) % attempts == 0
    assert not kept or spent + 2 * len(kept) < limit + 2 * attempts
    assert len(kept) == len(starts) or spent + 2 * len(kept) >= limit


RISE = "{use: rise, tasks_per_iteration: 24, attempts_per_task: 4, samples: 4, turns: 2, settle: 1}"


CLONING = "{use: imitation, source: self, tasks_per_iteration: 24, attempts_per_task: 4}"


def metrics_of(run: Path) -> list[dict[str, Any]]:
    files = sorted((run / "iterations").glob("*/metrics.json"))
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.method
@pytest.mark.parametrize(
    ("key", "limit", "trainer"),
    [
        # An iteration is 96 first attempts, and as many second ones of two steps each.
        ("environment_steps", 432, RISE),
        ("tokens", 2000, RISE),
        ("environment_steps", 200, RISE),
        ("environment_steps", 200, CLONING),
        ("tokens", 2000, CLONING),
    ],
)
def test_no_method_goes_far_beyond_its_budget(
    player: Path, tmp_path: Path, key: str, limit: int, trainer: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = SINGLE.replace("MODEL", str(player))
    plain = "{use: grpo, tasks_per_iteration: 12, attempts_per_task: 4}"
    recipe.write_text(text.replace(plain, trainer))
    wanted = ["iterations=9", f"budget.{key}={limit}"]
    output = tmp_path / "run"
    result = played(recipe, wanted, output)
    rounds = metrics_of(output)
    assert 0.9 * limit <= sum(m[f"rollout/{key}"] for m in rounds) <= 1.06 * limit
    assert len(rounds) < 9 and result["stopped"] is None
    # Stopped before its last iteration, it plays the same again and ends.
    last = output / "iterations" / f"{len(rounds) - 1:04d}"
    episodes = (last / "episodes.parquet").read_bytes()
    for folder in (last, output / "evaluations" / "final", output / "checkpoint"):
        shutil.rmtree(folder)
    (output / "result.json").unlink()
    played(recipe, wanted, output)
    assert (last / "episodes.parquet").read_bytes() == episodes
    assert len(metrics_of(output)) == len(rounds)
