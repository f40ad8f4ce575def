"""What trainers are tested with: a context of which only what a test names is there."""

import asyncio
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from selfwright.agents.chat import Chat, ChatConfig
from selfwright.commands.console import Display
from selfwright.core.hosting.pool import open_worlds
from selfwright.core.metrics import described
from selfwright.core.play.players import sharing
from selfwright.core.protocols import Context
from selfwright.core.recipe import read
from selfwright.core.types import (
    Action,
    Completion,
    Judged,
    Observation,
    Sampling,
    Step,
    Stop,
    Task,
    Trajectory,
    Verdict,
)
from selfwright.loop.progress import Progress
from selfwright.loop.run import run
from selfwright.loop.warm_start import prepare

AGENT = Chat(ChatConfig())
"""Whoever plays in these tests."""
SINGLE = """
seed: 3
iterations: 3
environment: {use: countdown, numbers: 2, largest: 9, attempts: 2, parallel: 256}
policy: {model: MODEL, max_tokens: 8}
trainer: {use: grpo, tasks_per_iteration: 12, attempts_per_task: 4}
learner: {rank: 4, alpha: 8, learning_rate: 1e-3, batch_size: 32}
evaluation: {tasks: 12, validation_tasks: 8, turns: 0}
"""
"""Small enough to be run in seconds, by a model of ``player``."""


def played(recipe: Path, overrides: Sequence[str], output: Path) -> dict[str, Any]:
    """The result of a whole run, in this process."""
    result = asyncio.run(run(read(recipe, overrides), output))
    for file in output.glob("iterations/*/metrics.json"):
        unknown = [name for name in json.loads(file.read_text()) if described(name) is None]
        assert not unknown, f"core.metrics does not say what these are: {unknown}"
    return result


WARM = """scratch:32x1, warm_start: {
  demonstrations: 800, learning_rate: 5e-3, noise: 0.3, batch_size: 64, KEYS}"""
"""With mistakes, so that it can go on after one."""


def warmed(folder: Path, keys: str, model: str = "") -> tuple[Path, str]:
    """The base of ``SINGLE``, with those keys of its warm start; and what was said meanwhile."""
    warm = re.sub(r"scratch:\w+", model, WARM) if model else WARM
    (folder / "tiny.yaml").write_text(SINGLE.replace("MODEL", warm.replace("KEYS", keys)))
    recipe = read(folder / "tiny.yaml")
    said = io.StringIO()

    async def make() -> str:
        settings = recipe.environment.config.model_dump(mode="json")
        async with await open_worlds(recipe.environment.use, settings, recipe.fleet) as worlds:
            display = Display(Console(file=said, soft_wrap=True))
            return await prepare(recipe, worlds, Progress(display))

    return Path(asyncio.run(make())), said.getvalue()


def context_of(**parts: Any) -> Context:
    """Whatever is not given fails when it is used."""
    names = ("judge", "policy", "attempt", "attempt_blind", "play_as", "named")

    async def find(name: str) -> Any:
        assert name == "policy", name
        return parts["policy"]

    def sampling_of(name: str) -> Sampling:
        return Sampling()

    default: dict[str, Any] = {
        "agent": AGENT,
        "open": find,
        "model_of": str,
        "sampling_of": sampling_of,
        "base": "",
        "seed": 0,
        **dict.fromkeys(names),
    }
    return Context(**(default | parts))


def step(
    task: Task,
    before: Sequence[Step],
    seen: Observation,
    said: Completion,
    reward: float = 0.0,
    answer: str | None = None,
) -> Step:
    """What comes of an answer to ``seen``, as when an episode is played."""
    prompt = sharing(AGENT.prompt(task, before, seen), before)
    return Step(seen, Action(said.text, said, prompt), reward, answer)


def episode(
    score: float | None,
    *turns: tuple[str, str],
    task: str = "t",
    attempt: int = 0,
    replayed: int = 0,
    max_steps: int = 9,
    sampled: bool = True,
) -> Judged:
    """``turns``: what was seen, and what was said then.

    Said as one token with log-probability -1, or as text only.
    """
    ids: tuple[tuple[int, ...], tuple[float, ...]] = ((7,), (-1.0,)) if sampled else ((), ())
    todo, steps = Task(task, f"do {task}", max_steps), list[Step]()
    for seen, said in turns:
        steps.append(step(todo, steps, Observation(seen), Completion(said, *ids)))
    won = score is not None and score >= 1
    trajectory = Trajectory(
        todo,
        tuple(steps),
        Observation("the end"),
        Stop.TERMINATED if won else Stop.TRUNCATED,
        "base",
        0,
        attempt,
        replayed,
        won,
    )
    return Judged(trajectory, Verdict(score, "", "test"))


def told(judged: Sequence[Judged]) -> list[str]:
    """What was said last in each."""
    return [one.trajectory.steps[-1].action.text for one in judged]
