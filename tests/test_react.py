"""The agent for pretrained models: what it shows, what it reads, and that a run keeps it."""

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from components import SINGLE, played
from hypothesis import given
from hypothesis import strategies as st

from selfwright.agents.react import React, ReactConfig
from selfwright.core.config import Config, Fleet
from selfwright.core.errors import RecipeError
from selfwright.core.hosting.pool import Worlds, open_worlds
from selfwright.core.play.briefing import briefed
from selfwright.core.play.draw import draw, starts
from selfwright.core.play.players import ExpertPlayer
from selfwright.core.play.rollout import rollouts
from selfwright.core.protocols import Briefing
from selfwright.core.recipe import section
from selfwright.core.store import read_trajectories
from selfwright.core.store.folder import LOCK
from selfwright.core.store.schema import EPISODES
from selfwright.core.types import (
    Action,
    Completion,
    Message,
    Observation,
    Prompt,
    Step,
    Task,
    TimeStep,
    Tool,
)
from selfwright.loop.evaluate import read_card

TASK = Task("t", "Open the box.", 5)
SEEN = Observation("A box.", actions=("open box", "Look around.", "look  around"))
ADDING = {
    "task": "train 1",
    "instruction": "Make 3 from 1 2.",
    "turns": [{"text": "", "action": "1+2"}],
}


def react(**keys: object) -> React:
    return React(config(**keys))


def config(**keys: object) -> ReactConfig:
    return ReactConfig.model_validate_json(json.dumps(keys))


def words(prompt: Prompt) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in prompt.messages]


@pytest.mark.parametrize(
    ("text", "action", "why"),
    [
        ("Action: open box", "open box", ""),
        ("It is shut.\nAction:  OPEN  box. \nAction: look", "open box", ""),
        ("<think>Action: jump</think>\naction: open box", "open box", ""),
        ("Action: jump\n</think>I know.\n Action: open box", "open box", ""),
        ("open box", "", "No action: begin a line with 'Action:'."),
        ("The Action: open box", "", "No action: begin a line with 'Action:'."),
        ("Action:\nopen box", "", "No action: nothing follows 'Action:'."),
        ("<think>Action: open box", "", "The thought did not end."),
        ("Action: jump", "", "'jump' is none of the listed actions."),
        # Two are alike, so it must be one of them to the letter.
        ("Action: look around", "", "'look around' is none of the listed actions."),
        ("Action: Look around.", "Look around.", ""),
    ],
)
def test_one_rule_reads_the_action(text: str, action: str, why: str) -> None:
    parsed = react().parse(text, SEEN)
    assert (parsed.action, parsed.invalid) == (action, why)


@given(st.text(max_size=30), st.text(max_size=30))
def test_what_it_says_it_reads(action: str, thought: str) -> None:
    agent = react()
    line = " ".join(action.split())  # An action is one line.
    text = f"<think>{thought}</think>\n{agent.phrase(line)}"
    parsed = agent.parse(text, Observation(""))
    assert parsed.action == line and bool(parsed.invalid) == (not line)
    assert not (parsed.action and parsed.invalid)


def test_the_prompt_is_words_shots_and_the_task() -> None:
    given_ = config(shots=1, examples=[ADDING, ADDING | {"task": "t"}], thoughts=True)
    tool = Tool("take", "Take a thing.", '{"properties":{"thing":{},"from":{}}}')
    agent = React(React.briefed(given_, Briefing((tool,), ())))
    system, *rest = words(agent.prompt(TASK, (), SEEN))
    assert system == (
        "system",
        "You act in a world, one action a turn, until the task is done.\n"
        "You can do this:\n- take(thing, from): Take a thing.\n"
        "First write what you think, in one line.\n"
        "Then write Action: and the action, in a line of its own.",
    )
    # That of the very task is left out.
    shown = "A box.\nActions: open box; Look around.; look  around"
    assert rest == [
        ("user", "Make 3 from 1 2."),
        ("assistant", "Action: 1+2"),
        ("user", f"Open the box.\n{shown}"),
    ]
    assert react(system="").prompt(TASK, (), SEEN).messages[0].role == "user"


def test_thoughts_are_kept_or_dropped() -> None:
    sampled = Completion("Hm.\nAction: open box", (5, 6), (-1.0, -2.0), "stop", "v")
    step = Step(SEEN, Action("open box", sampled), 0.0)
    failed = Step(SEEN, Action("", Completion("Hm.", (7,)), invalid="No action."), 0.0)
    kept = react().prompt(TASK, (step,), Observation("Open."))
    assert kept.messages[-2] == Message("assistant", (sampled.text,), (5, 6), "v")
    dropped = react(keep_thoughts=False).prompt(TASK, (step, failed), Observation("Open."))
    assert dropped.messages[-4] == Message("assistant", ("Action: open box",))
    # What was no action stands as it was said: else nothing would tell what was wrong.
    assert dropped.messages[-2] == Message("assistant", ("Hm.",), (7,))
    # A window still opens with the task.
    short = react(window=1).prompt(TASK, (step, step), Observation("Open."))
    assert [role for role, _ in words(short)] == ["system", "user"]


async def told(worlds: Worlds, seed: int, **keys: object) -> ReactConfig:
    agent, _ = section("agent", "react", [], keys)
    found = (await briefed(agent, worlds, seed)).config
    assert isinstance(found, ReactConfig)
    return found


@pytest.mark.parametrize("shots", [1, 3])
def test_shots_are_the_experts_by_seed_and_never_the_task_at_hand(shots: int) -> None:
    async def main() -> None:
        async with await open_worlds("countdown", {}, Fleet.model_validate({})) as worlds:
            config = await told(worlds, 0, shots=shots)
            # One to spare; all of training tasks, for by others' names nothing is found.
            tasks = [await worlds.named(shot.task) for shot in config.examples]
            assert len({task.id for task in tasks}) == shots + 1
            for shot, task in zip(config.examples, tasks, strict=True):
                (done,) = await rollouts(ExpertPlayer(), worlds, starts([task], 1, 0), 0)
                assert [turn.action for turn in shot.turns] == [
                    step.action.text for step in done.steps
                ]
                assert shot.instruction == task.instruction and done.success
            agent = React(config)
            for task in (*tasks, *await draw(worlds.tasks("test"), 1, 0)):
                *before, asked = agent.prompt(task, (), Observation("")).messages[1:]
                assert len(before) == 2 * shots and asked.text == task.instruction
                assert not any(task.instruction in message.text for message in before)
            assert await told(worlds, 0, shots=shots) == config
            assert (await told(worlds, 1, shots=shots)).examples != config.examples
            # Whoever has been told, or brings his own, is told nothing else.
            own = await told(worlds, 1, shots=shots, examples=[ADDING])
            assert [shot.task for shot in own.examples] == ["train 1"]
            assert (await told(worlds, 0)).examples == ()

    asyncio.run(main())


def test_a_world_without_an_expert_is_named() -> None:
    async def main() -> None:
        fleet = Fleet.model_validate({"isolation": "inline"})
        async with await open_worlds("test_react:Silent", {}, fleet) as worlds:
            await told(worlds, 0, shots=2)

    with pytest.raises(RecipeError, match=r"agent\.shots: 2 is for worlds with an expert"):
        asyncio.run(main())


class Silent:
    """A world without an expert."""

    Config = Config

    def __init__(self, config: Config) -> None:
        pass

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(f"{split} {k}", "Say it.", 1) for k in range(9)]

    async def reset(self, task: Task, seed: int) -> Observation:
        return Observation("")

    async def step(self, action: str) -> TimeStep:
        return TimeStep(Observation(""), 0.0, terminated=True)

    async def close(self) -> None:
        pass


@pytest.mark.method
def test_a_run_keeps_its_shots_and_learns_in_its_form(player: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    trainer = "trainer: {use: imitation, tasks_per_iteration: 12}"
    lines = SINGLE.replace("MODEL", str(player)).splitlines()
    lines = [trainer if line.startswith("trainer:") else line for line in lines]
    recipe.write_text("\n".join(lines))
    overrides = ["agent.use=react", "agent.shots=2", "iterations=1", "policy.max_tokens=16"]
    played(recipe, overrides, tmp_path / "run")
    # What a run that came to nothing was told is nothing to one of another recipe.
    other = tmp_path / "other"
    other.mkdir()
    for name in ("recipe.json", "agent.json", LOCK):
        shutil.copy(tmp_path / "run" / name, other)
    played(recipe, ["iterations=1"], other)
    card = read_card(str(other / "iterations" / "0000" / "checkpoint"))
    assert card is not None and card["agent"]["use"] == "chat"
    kept = json.loads((tmp_path / "run" / "agent.json").read_text())
    assert kept["use"] == "react" and len(kept["examples"]) == 3
    for place in ("run", "run/checkpoint", "run/iterations/0000/checkpoint"):
        card = read_card(str(tmp_path / place))
        assert card is not None and card["agent"] == kept
    episodes = read_trajectories(tmp_path / "run" / "iterations" / "0000" / EPISODES)
    assert len(episodes) == 12
    for one in episodes:
        for step in one.trajectory.steps:
            assert step.action.completion.text == f"Action: {step.action.text}"
            assert len(step.action.prompt.messages) == 6
