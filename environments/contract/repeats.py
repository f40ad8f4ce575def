"""Whether a world repeats itself: in one process, in two, from a snapshot, after a death."""

import asyncio
import os
import signal
from typing import Any

from ...core.errors import WorldError
from ...core.hosting.pool import launch_of
from ...core.hosting.worker import LocalWorker
from ...core.play.episode import unlike
from ...core.types import Observation, TimeStep
from .episodes import (
    Broken,
    Episode,
    replay,
    seeded,
    some,
)
from .examination import Examination, Skipped, has, rule_of

GONE_S = 10.0
"""How long a far end may take to go, once nobody speaks to it any more."""


async def same_process(exam: Examination) -> str:
    """The same seed and actions give the same episode, even while another like it is played."""
    rule = rule_of(exam)
    async with exam.here.lease() as one, exam.here.lease() as other:
        for episode in exam.played:
            played = episode.task, episode.seed, replay(episode)
            _alike(episode, await exam.watch.play(one, *played), rule)
            for again in await asyncio.gather(
                exam.watch.play(one, *played), exam.watch.play(other, *played)
            ):
                _alike(episode, again, rule)
    return f"{len(exam.played)} episodes, each played three times more, two of them side by side"


async def two_processes(exam: Examination) -> str:
    rule = rule_of(exam)
    tasks = await some(exam.there.tasks("train"), exam.episodes)
    async with exam.there.lease() as world:
        for task, episode in zip(tasks, exam.played, strict=True):
            again = await exam.watch.play(world, task, episode.seed, replay(episode))
            _alike(episode, again, rule)
    return f"{len(exam.played)} episodes, played again in another process"


async def snapshots(exam: Examination) -> str:
    """From a state that was taken another instance, in another process, goes on as it did."""
    if not (has(exam, "snapshot") and has(exam, "restore")):
        raise Skipped("the world takes no snapshots")
    compared = 0
    async with exam.here.lease() as one, exam.there.lease() as other:
        for episode in exam.played:
            for half in sorted({1, len(episode.steps) // 2} - {0, len(episode.steps)}):
                one.snapshots = True
                played = episode.task, episode.seed, replay(episode)
                await exam.watch.play(one, *played, longest=half)
                restored = other.restore(episode.task, one.snapshot)
                first = await exam.watch.timed("reset", restored)
                rest = Episode(
                    episode.task,
                    episode.seed,
                    episode.actions[half:],
                    episode.steps[half - 1].observation,
                    episode.steps[half:],
                    episode.gave_up,
                )
                on = exam.watch.play_on(
                    other, episode.task, episode.seed, first, replay(episode, half)
                )
                _alike(rest, await on, exam.here.spec.repeatable)
                compared += 1
        one.snapshots = False
    if not compared:
        raise Skipped("no episode went on after its first step")
    return f"{compared} states, gone on from in another process"


async def killed(exam: Examination) -> str:
    """A process that dies is noticed at once, and the next one plays."""
    task = await exam.there.tasks("train").at(0)
    async with exam.there.lease() as world:
        await exam.watch.timed("reset", world.reset(task, seeded(0)))
        (process,) = exam.there.processes
        os.kill(process, signal.SIGKILL)
        try:
            await exam.watch.timed("step", world.step("anything"))
        except WorldError:
            pass
        else:
            raise Broken("a step was answered after the process was killed")
    async with exam.there.lease() as world:
        await exam.watch.timed("reset", world.reset(task, seeded(0)))
    return "kill -9 is noticed, and another process plays on"


async def wire(exam: Examination) -> str:
    """A far end says what it cannot do, goes on after it, and goes when nobody speaks to it."""
    if not exam.fleet.elsewhere:
        raise Skipped("the far end is our own")
    limit = exam.fleet.start_timeout_s or exam.here.spec.start_timeout_s
    worker = LocalWorker(launch_of(exam.name, exam.config, exam.fleet))
    try:
        async with asyncio.timeout(limit):
            await asyncio.shield(worker.opened)
            refused: list[tuple[str, dict[str, Any], str]] = [
                ("hello", {"protocol": 0, "frame_mb": 1, "speaks": "check"}, "protocol 0"),
                ("no such call", {}, "a call that there is not"),
                ("step", {"instance": 99, "action": ""}, "a step of an instance that there is not"),
                ("task", {"split": "train", "indices": [2**40]}, "a task that there is not"),
            ]
            for call, details, what in refused:
                try:
                    await worker.ask(call, **details)
                except WorldError:
                    continue
                raise Broken(f"the far end did not refuse {what}")
            await worker.ask("tasks", split="train")
        if not await worker.hung_up(GONE_S):
            raise Broken(f"the far end lived on for {GONE_S:g} s when nobody spoke to it any more")
    finally:
        await worker.stop()
    return f"{len(refused)} wrong calls refused; it goes when it is left"


def _alike(episode: Episode, again: Episode, rule: str) -> None:
    """Raises: Broken: they differ in what a world that is so repeatable repeats."""
    for turn, (one, other) in enumerate(zip(episode.seen, again.seen, strict=False)):
        if _differ(one, other, rule):
            when = f"after action {turn}, {episode.actions[turn - 1]!r}," if turn else "after reset"
            raise Broken(
                f"{episode.task.id!r} with seed {episode.seed} does not repeat itself: {when} "
                f"once {_short(one)}, then {_short(other)}"
            )
    if len(episode.seen) != len(again.seen):
        raise Broken(f"{episode.task.id!r} once ended later than with the same seed before")


def _differ(one: object, other: object, rule: str) -> bool:
    if isinstance(one, Observation) and isinstance(other, Observation):
        return bool(unlike(one, other, rule))
    assert isinstance(one, TimeStep) and isinstance(other, TimeStep)
    names = ("reward", "terminated", "truncated", "success", "answer")
    same_rest = all(getattr(one, name) == getattr(other, name) for name in names)
    return not same_rest or bool(unlike(one.observation, other.observation, rule))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 160 else text[:157] + "..."
