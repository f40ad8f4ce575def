"""The introspection table: played without looking at the label, the same wherever a world lives."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from selfwright.commands.words import evaluation_words, table_words
from selfwright.core.hosting.pool import open_worlds
from selfwright.core.play.players import ExpertPlayer, Player, RandomPlayer
from selfwright.core.recipe import section
from selfwright.core.statistics import Introspection
from selfwright.core.types import Trajectory
from selfwright.loop.evaluate import EvalSpec, evaluate, exam_tasks, introspect
from selfwright.loop.progress import Progress


@pytest.fixture(autouse=True)
def _fixtures_importable(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])


def eval_spec_of(world: str, *options: str, turns: int = 4) -> EvalSpec:
    environment, fleet = section("environment", world, [f"environment.{o}" for o in options])
    agent, judge = section("agent", "chat")[0], section("judge", "reward")[0]
    return EvalSpec(environment, agent, fleet, "test", 30, 5, 0.0, turns, judge)


def table_of(spec: EvalSpec, player: Player) -> tuple[Introspection, list[Trajectory]]:
    async def run() -> tuple[Introspection, list[Trajectory]]:
        settings = spec.environment.config.model_dump(mode="json")
        async with await open_worlds(spec.environment.use, settings, spec.fleet) as worlds:
            progress = Progress()
            tasks = await exam_tasks(worlds, spec.split, spec.tasks, spec.seed, progress)
            return await introspect(spec, player, worlds, tasks)

    return asyncio.run(run())


def seen(trajectories: list[Trajectory]) -> list[Any]:
    return [[(s.observation, s.action) for s in t.steps] for t in trajectories]


def test_the_label_changes_what_is_counted_and_nothing_that_is_played() -> None:
    # Nobody answers 4; a third of all answers are 2.
    never, third = (
        table_of(eval_spec_of("faulty_worlds:Sum", f"right='{right}'"), RandomPlayer())
        for right in ("4", "2")
    )
    parallel, sequential = slice(0, 120), slice(150, 180)
    for part in (parallel, sequential):
        assert seen(never[1][part]) == seen(third[1][part])
    assert {len(t.steps) for t in third[1][sequential]} == {4}, "right answers end nothing"
    assert never[0].m1_t1.rate == never[0].m1_tk.rate == never[0].p1_tk.rate == 0
    assert third[0].p1_tk.rate > 0.5
    assert 0 < third[0].m1_t1.rate < 0.7 and third[0].m1_tk.rate > 0


@pytest.mark.parametrize("player", [RandomPlayer(), ExpertPlayer()])
def test_the_table_is_the_same_in_another_process_beyond_the_tasks_own_turns(
    player: Player,
) -> None:
    here, there = (
        table_of(eval_spec_of("countdown", "attempts=2", "numbers=2", f"isolation={where}"), player)
        for where in ("inline", "process")
    )
    assert here == (there[0], here[1]) and seen(here[1]) == seen(there[1])
    assert {len(t.steps) for t in there[1][-30:]} == {4}, "all turns are played"
    if isinstance(player, ExpertPlayer):
        assert there[0].m1_t1.rate == there[0].m1_tk.rate == there[0].p1_tk.rate == 1


def test_an_evaluation_in_words() -> None:
    spec = eval_spec_of("countdown", "numbers=2")

    async def run() -> dict[str, Any]:
        progress = Progress()
        settings = spec.environment.config.model_dump(mode="json")
        async with await open_worlds(spec.environment.use, settings, spec.fleet) as worlds:
            judge = spec.judge.make()
            result, judged = await evaluate(
                spec, ExpertPlayer(), judge, worlds, progress, "expert", "here"
            )
        assert [one.verdict.score for one in judged] == [1.0] * 30
        assert [one.score for one in result.results] == [1.0] * 30
        assert (result.undecided, result.failed, result.success_rate) == (0, 0, 1.0)
        # 30 episodes of one step; and 30 times 4 + 1 + 4 for the table.
        assert result.environment_steps == 30 + 30 * 9
        from dataclasses import asdict

        return asdict(result) | {"folder": "there"}

    words = evaluation_words(asyncio.run(run())).splitlines()
    assert words[0].startswith("expert in countdown, test: 30 of 30 solved, 100.0% [")
    assert words[1] == "0 failed, 0 undecided, 1.0 steps and a reward of 1.000 on average"
    assert words[2].split() == ["m1@t1", "m4@t1", "m1@t4", "p1@t4", "m1@t4", "-", "m1@t1"]
    assert words[3].split() == ["100.0%"] * 4 + ["+0.0"]
    assert words[-1] == "in there"


def test_the_gain_in_the_table_is_that_of_majority_voting() -> None:
    def table(*rates: float) -> dict[str, Any]:
        keys = ("m1_t1", "mk_t1", "m1_tk", "p1_tk")
        cells: dict[str, Any] = {key: {"rate": r} for key, r in zip(keys, rates, strict=True)}
        flips = {"wrong_to_right": [3], "right_to_wrong": [1]}
        return {"k": 2, "turn_accuracy": [0.2, 0.25], **cells, **flips}

    lines = table_words([("before", table(0.2, 0.3, 0.25, 0.4))])
    assert lines[1].split() == ["before", "20.0%", "30.0%", "25.0%", "40.0%", "+5.0"]
    assert lines[2].endswith("right at turns 1 to 2; 3 mended, 1 spoilt")
