"""TextWorld-Express: all games, their experts, and many episodes in one Java machine."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from selfwright.core.config import Fleet
from selfwright.core.errors import WorldError
from selfwright.core.hosting.pool import open_worlds
from selfwright.core.types import Observation, TimeStep
from selfwright.environments.textworld_express import (
    Game,
    TextWorldExpress,
    TextWorldExpressConfig,
    shortened,
    squeezed,
)

pytestmark = pytest.mark.jvm

GAMES = get_args(Game)
Log = list[Observation | TimeStep]


@pytest.fixture(autouse=True, scope="module")
def _one_machine_for_all() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """It runs as long as somebody uses it."""
    holder = TextWorldExpress(TextWorldExpressConfig.model_validate({}))
    yield
    asyncio.run(holder.close())


def playing(use: Callable[[TextWorldExpress], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        world = TextWorldExpress(TextWorldExpressConfig.model_validate(settings))
        try:
            await use(world)
        finally:
            await world.close()

    asyncio.run(run())


async def shown_by_expert(world: TextWorldExpress) -> tuple[list[str], list[TimeStep]]:
    actions: list[str] = []
    steps: list[TimeStep] = []
    while (action := await world.expert()) is not None:
        actions.append(action)
        steps.append(await world.step(action))
        if steps[-1].terminated or steps[-1].truncated:
            break
    return actions, steps


@pytest.mark.parametrize("game", GAMES)
def test_every_game_is_won_by_its_expert_and_pays_one(game: str) -> None:
    async def use(world: TextWorldExpress) -> None:
        for split in ("train", "validation", "test"):
            tasks = world.tasks(split)
            assert len(tasks) == 1000
            assert tasks[7].id == f"{game} {split} {tasks[7].game_seed}"
            await world.reset(tasks[7], 0)
            actions, steps = await shown_by_expert(world)
            assert steps[-1].success and steps[-1].terminated
            assert sum(step.reward for step in steps) == pytest.approx(1.0)
            assert actions[0] != "look around" and len(actions) <= tasks[7].max_steps
            await world.reset(tasks[7], 1)
            assert [await world.step(action) for action in actions] == steps

    playing(use, game=game)


def test_demonstrations_repeat_by_seed_and_vary_with_it() -> None:
    async def use(world: TextWorldExpress) -> None:
        task = world.tasks("train")[3]
        runs: list[list[str]] = []
        for seed in (0, 0, 1, 2, 3, 4):
            await world.reset(task, seed)
            runs.append((await shown_by_expert(world))[0])
        assert runs[0] == runs[1]
        assert len({tuple(run) for run in runs}) > 1

    playing(use, game="twc")


def test_the_expert_finds_its_way_from_wherever_the_player_has_gone() -> None:
    async def use(world: TextWorldExpress) -> None:
        tasks, solved = world.tasks("train"), 0
        for index in range(10):
            await world.reset(tasks[index], index)
            for turn in range(4):
                await world.step(await world.random(turn))
            planned = await world.expert()
            assert planned is not None
            await world.step("dance")  # changes nothing
            assert await world.expert() is not None
            _, steps = await shown_by_expert(world)
            solved += steps[-1].success
        assert solved == 10

    playing(use, game="coin", parameters={"numLocations": 5})


def test_the_expert_gives_up_when_too_few_steps_are_left() -> None:
    async def use(world: TextWorldExpress) -> None:
        await world.reset(world.tasks("train")[0], 0)
        assert await world.expert() is None
        step = await world.step("look around")
        assert (step.terminated, step.truncated) == (False, False)
        step = await world.step("look around")
        assert (step.terminated, step.truncated) == (False, True)
        with pytest.raises(RuntimeError, match="reset the world"):
            await world.step("look around")

    playing(use, game="sorting", max_steps=2)


@pytest.mark.parametrize("game", ["sorting", "coin", "cookingworld", "peckingorder"])
def test_episodes_of_one_task_side_by_side_do_not_disturb_one_another(game: str) -> None:
    async def run() -> None:
        config = TextWorldExpressConfig.model_validate({"game": game})
        worlds = [TextWorldExpress(config) for _ in range(4)]
        task = worlds[0].tasks("train")[3]

        async def play(world: TextWorldExpress, player: int) -> Log:
            log: Log = [await world.reset(task, 0)]
            for turn in range(25):
                await asyncio.sleep(0)  # the others' turn
                way = player % 2 == 0 and await world.expert()
                step = await world.step(way or await world.random(turn * 10 + player))
                log.append(step)
                if step.terminated:
                    break
            return log

        alone = [await play(worlds[0], player) for player in range(4)]
        together = await asyncio.gather(*(play(w, player) for player, w in enumerate(worlds)))
        assert together == alone
        for world in worlds:
            await world.close()

    asyncio.run(run())


def test_a_failure_ends_the_episode_and_takes_back_what_was_earned() -> None:
    async def use(world: TextWorldExpress) -> None:
        await world.reset(world.tasks("train")[0], 0)
        right = await world.expert()
        assert right is not None
        first = await world.step(right)
        assert 0 < first.reward < 1
        meant = await world.expert()
        wrong = next(one for one in first.observation.actions if one != meant)
        last = await world.step(wrong)
        assert last.terminated and not last.success
        assert first.reward + last.reward == 0

    playing(use, game="simonsays")


def test_actions_are_listed_or_left_to_be_thought_of() -> None:
    async def listed(world: TextWorldExpress) -> None:
        task = world.tasks("train")[0]
        first = await world.reset(task, 0)
        assert first.actions == tuple(sorted(set(first.actions))) and "look around" in first.actions
        assert task.instruction.endswith("Answer with one listed action.")
        assert {await world.random(seed) for seed in range(200)} == set(first.actions)

    async def free(world: TextWorldExpress) -> None:
        task = world.tasks("train")[0]
        first = await world.reset(task, 0)
        assert first.actions == ()
        assert "take coin" in task.instruction
        unknown = await world.step("sing a song")
        assert unknown.observation.text.startswith("Unknown action")
        again = await world.step("  LOOK  Around ")
        assert again.observation.text == first.text

    playing(listed, game="coin", listed=True)
    playing(free, game="coin", listed=False)


def test_what_is_carried_at_the_start_is_said() -> None:
    async def use(world: TextWorldExpress) -> None:
        first = await world.reset(world.tasks("train")[0], 0)
        assert first.text.endswith("You carry a map.")

    playing(use, game="mapreader")


def test_brief_descriptions_keep_every_thing() -> None:
    text = (
        "You are in the kitchen. In one part of the room you see a stove. There is also a fridge "
        "that is closed. You also see An open trash can, that contains a green apple. In another "
        "part of the room you see a counter that has a knife, and a cookbook on it. There is also "
        "a dining chair, that has nothing on it. \nTo the North you see a closed wood door. "
        "Through an open wood door, to the East you see the laundry room. "
    )
    assert shortened(squeezed(text)) == (
        "kitchen: stove. closed fridge. open trash can with green apple. counter with knife, and "
        "cookbook. dining chair.\nnorth closed wood door. open east laundry room."
    )

    async def use(world: TextWorldExpress) -> None:
        first = await world.reset(world.tasks("train")[0], 0)
        assert first.text.startswith("kitchen: stove. oven. closed fridge.")

    playing(use, game="coin", brief=True)


def test_settings_are_checked_by_name_and_by_the_game() -> None:
    for settings, said in (
        ({"game": "coin", "parameters": {"numLocation": 4}}, "did you mean 'numLocations'"),
        ({"game": "sorting", "parameters": {"numLocations": 4}}, "it has none"),
        ({"game": "chess"}, "coin"),
    ):
        with pytest.raises(ValidationError, match=said):
            TextWorldExpressConfig.model_validate(settings)
    many = TextWorldExpressConfig.model_validate({"parameters": {"numLocations": 99}})
    with pytest.raises(WorldError, match="less than or equal to 11"):
        TextWorldExpress(many)


def test_parameters_that_leave_no_game_say_so() -> None:
    async def use(world: TextWorldExpress) -> None:
        with pytest.raises(WorldError, match="No locations could be found that distance apart"):
            for task in world.tasks("train"):
                await world.reset(task, 0)

    playing(use, game="mapreader", parameters={"numLocations": 5})


def test_sixty_four_episodes_share_one_machine() -> None:
    async def run() -> None:
        fleet = Fleet.model_validate({"parallel": 64})
        config = {"parameters": {"numLocations": 3, "includeDoors": False}, "brief": True}
        async with await open_worlds("textworld_express", config, fleet) as worlds:
            tasks = await worlds.tasks("train").take(range(8))
            assert tasks[2].id == "coin includeDoors=0,numLocations=3 train 2"

            async def play(index: int) -> tuple[bool, float]:
                async with worlds.lease() as world:
                    observation, paid = await world.reset(tasks[index // 8], 5), 0.0
                    for turn in range(40):
                        action = await world.expert() if index % 2 else None
                        draw = random.Random(turn * 100 + index)
                        step = await world.step(action or draw.choice(observation.actions))
                        observation, paid = step.observation, paid + step.reward
                        if step.terminated:
                            return step.success, paid
                    return False, paid

            played = await asyncio.gather(*(play(index) for index in range(64)))
            assert all(success and paid == 1 for success, paid in played[1::2])
            assert len(worlds.processes) == 1

    asyncio.run(run())
