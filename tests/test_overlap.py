"""Rounds that overlap: groups that close early, slots that rounds share, learning while playing."""

import asyncio
import json
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from components import SINGLE, played

from selfwright.agents.chat import Chat, ChatConfig
from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
from selfwright.core.config import Fleet, Rollout
from selfwright.core.hosting.pool import World, Worlds, open_worlds
from selfwright.core.play.draw import draw, starts
from selfwright.core.play.episode import turn_seed
from selfwright.core.play.players import PolicyPlayer
from selfwright.core.play.rollout import rollouts
from selfwright.core.store import read_trajectories
from selfwright.core.types import (
    Action,
    Completion,
    Observation,
    Sampling,
    Start,
    Step,
    Stop,
    Task,
    Trajectory,
)

WORLD = {"numbers": 2, "largest": 9, "attempts": 2}
PATIENCE_S = 60
"""A test that hangs for so long has failed."""


@dataclass
class Sleepy:
    """Gives wrong answers, and falls asleep for good before some turns of some attempts."""

    starts: Sequence[Start]
    asleep: dict[int, int]
    """By attempt, the turn before which it sleeps."""
    name: str = "sleepy"
    slept: asyncio.Event = field(default_factory=asyncio.Event)
    seeds: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])

    def __post_init__(self) -> None:
        for start in self.starts:
            for turn in range(start.task.max_steps):
                self.seeds[turn_seed(0, start, turn)] = (start.attempt, turn)

    def batch_slot(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def act(
        self,
        world: World,
        task: Task,
        history: Sequence[Step],
        observation: Observation,
        seed: int,
    ) -> Action:
        attempt, turn = self.seeds[seed]
        if self.asleep.get(attempt) == turn:
            self.slept.set()
            await asyncio.Event().wait()
        return Action("1", Completion("1"))


async def opened(parallel: int) -> Worlds:
    return await open_worlds("countdown", WORLD, Fleet.model_validate({"parallel": parallel}))


def sleepily(asleep: dict[int, int], parallel: int = 64, **patience: Any) -> list[Trajectory]:
    """Four attempts at each of three tasks."""

    async def run() -> list[Trajectory]:
        async with asyncio.timeout(PATIENCE_S), await opened(parallel) as worlds:
            begin = starts(await draw(worlds.tasks("train"), 3, 0), 4, 0)
            player = Sleepy(begin, asleep)
            told: list[int] = []
            how = Rollout.model_validate(patience)
            made = await rollouts(player, worlds, begin, 0, told.append, how)
            assert told == list(range(1, 13))
            assert [(t.task.id, t.attempt) for t in made] == [
                (s.task.id, s.attempt)
                for s in begin
                if (s.task.id, s.attempt) in {(t.task.id, t.attempt) for t in made}
            ]
            return made

    return asyncio.run(run())


def test_a_group_closes_when_enough_have_ended() -> None:
    made = sleepily({2: 1}, enough=0.75)
    late = [t for t in made if t.stop == Stop.FAILED]
    assert len(made) == 12 and len(late) == 3
    # What they did is kept.
    assert {(t.attempt, len(t.steps)) for t in late} == {(2, 1)}
    assert {t.error for t in late} == {"Late: 3 of 4 attempts had ended well"}
    assert all(len(t.steps) == 2 and not t.error for t in made if t not in late)


def test_what_a_closed_group_has_not_begun_is_not_played() -> None:
    made = sleepily({}, parallel=1, enough=0.5)
    assert [t.attempt for t in made] == [0, 1] * 3
    assert not any(t.error for t in made)
    # Rounded up: never fewer than the share.
    assert [t.attempt for t in sleepily({}, parallel=1, enough=0.51)] == [0, 1, 2] * 3


def test_a_group_closes_when_it_is_time() -> None:
    made = sleepily({0: 0, 3: 1}, group_timeout_s=0.3)
    late = [t for t in made if t.stop == Stop.FAILED]
    assert {(t.attempt, len(t.steps)) for t in late} == {(0, 0), (3, 1)} and len(late) == 6
    assert {t.error for t in late} == {"Late: 2 of 4 attempts had ended well after 0.3 s"}
    # One after another, the time of a group begins with its first.
    alone = sleepily({0: 0}, parallel=1, group_timeout_s=0.2)
    assert [(t.attempt, t.error) for t in alone] == [
        (0, "Late: 0 of 4 attempts had ended well after 0.2 s")
    ] * 3


@pytest.fixture
def policy(player: Path) -> TransformersPolicy:
    return TransformersPolicy(TransformersConfig(model=str(player), max_tokens=8), str(player), 0)


@pytest.mark.method
def test_rounds_share_their_slots_and_no_batch_waits_for_who_has_none(
    policy: TransformersPolicy,
) -> None:
    async def run() -> None:
        async with asyncio.timeout(PATIENCE_S), await opened(parallel=3) as worlds:
            mind = PolicyPlayer(Chat(ChatConfig()), policy, Sampling(max_tokens=8))
            begin = starts(await draw(worlds.tasks("train"), 4, 0), 2, 0)
            several = (rollouts(mind, worlds, begin, seed) for seed in (0, 1))
            for made in await asyncio.gather(*several):
                assert len(made) == len(begin)
                assert all(t.steps and not t.error for t in made)
            assert not worlds.slots.locked()
        await policy.close()

    asyncio.run(run())


def test_a_round_that_is_given_up_leaves_its_slots() -> None:
    async def run() -> None:
        async with asyncio.timeout(PATIENCE_S), await opened(parallel=2) as worlds:
            begin = starts(await draw(worlds.tasks("train"), 2, 0), 2, 0)
            hung = Sleepy(begin, {k: 0 for k in range(2)})
            waiting = [asyncio.create_task(rollouts(hung, worlds, begin, 0)) for _ in range(2)]
            await hung.slept.wait()
            assert worlds.slots.locked()
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            made = await rollouts(Sleepy(begin, {}), worlds, begin, 0)
            assert len(made) == 4 and not any(t.error for t in made)

    asyncio.run(run())


def metrics_of(output: Path) -> list[dict[str, float]]:
    files = sorted(output.glob("iterations/*/metrics.json"))
    return [json.loads(file.read_text()) for file in files]


def versions_of(folder: Path) -> list[int]:
    return [
        step.action.completion.version
        for judged in read_trajectories(folder)
        for step in judged.trajectory.steps
    ]


@pytest.mark.method
def test_playing_ahead_is_bounded_and_told(player: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SINGLE.replace("MODEL", str(player)))
    played(recipe, [], tmp_path / "now")
    assert all(m["rollout/staleness_max"] == 0 for m in metrics_of(tmp_path / "now"))
    output = tmp_path / "ahead"
    wanted = ["rollout.max_staleness=2", "iterations=5", "learner.learning_rate=5e-3"]
    wanted.append("learner.batch_size=1024")  # One step an iteration: what it meets is unchanged.
    result = played(recipe, wanted, output)
    assert len(result["costs"]) == 5
    told = metrics_of(output)
    assert max(m["rollout/staleness_max"] for m in told) in (1, 2)
    for index, metrics in enumerate(told):
        made = versions_of(output / "iterations" / f"{index:04d}")
        assert all(index - 2 <= version <= index for version in made)
        assert metrics["rollout/staleness"] == pytest.approx(index - sum(made) / len(made))
        # The ratio is to the weights that sampled, not to those the update began with.
        if metrics["rollout/staleness_max"] == 0:
            assert abs(metrics["train/kl_old"]) < 1e-5
        if metrics["rollout/staleness"] >= 1 and index >= 2:
            assert abs(metrics["train/kl_old"]) > 1e-5
    for name, version in {"base": 0, "final": 5}.items():
        assert set(versions_of(output / "evaluations" / name)) == {version}
    # Stopped before its last iteration, it plays that again and ends.
    for name in ("iterations/0004", "evaluations/final", "checkpoint"):
        shutil.rmtree(output / name)
    (output / "result.json").unlink()
    assert len(played(recipe, wanted, output)["costs"]) == 5
    assert set(versions_of(output / "iterations" / "0004")) == {4}


@pytest.mark.method
def test_a_budget_is_not_played_beyond(player: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SINGLE.replace("MODEL", str(player)))
    # An iteration is 48 episodes of one or two steps: two iterations are 96 to 192 of them.
    wanted = ["rollout.max_staleness=3", "iterations=9", "budget.environment_steps=96"]
    result = played(recipe, wanted, tmp_path / "run")
    assert 1 <= len(result["costs"]) <= 2
    assert not list((tmp_path / "run" / "iterations").glob(".draft*"))


@pytest.mark.method
def test_late_attempts_are_stored_and_not_learned(player: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SINGLE.replace("MODEL", str(player)))
    # Five at once: when three quarters of 48 have ended, others are being played.
    wanted = ["rollout.enough=0.75", "iterations=1", "environment.parallel=5"]
    result = played(recipe, wanted, tmp_path / "run")
    (metrics,) = metrics_of(tmp_path / "run")
    stored = read_trajectories(tmp_path / "run" / "iterations" / "0000")
    well = [j for j in stored if j.trajectory.stop != Stop.FAILED]
    assert result["costs"][0]["episodes"] == len(stored) and len(well) >= 36
    assert metrics["failures/Late"] == len(stored) - len(well)
    assert all(j.verdict.score is None for j in stored if j not in well)
    assert metrics["train/examples"] <= sum(len(j.trajectory.steps) for j in well)
