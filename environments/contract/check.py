"""Tests a world against its contract, on tasks of its own."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import psutil
from pydantic import ValidationError

from ...core.checked import alike, readable, same
from ...core.config import Fleet
from ...core.errors import PluginError, WorldError
from ...core.hosting.pool import Worlds, launch_of, open_worlds
from ...core.hosting.spec import has_attempts
from ...core.hosting.worker import LocalWorker
from ...core.play.rollout import unlike
from ...core.types import Observation, Task, TimeStep
from .episodes import (
    ODD_ACTIONS,
    Broken,
    Chooser,
    Episode,
    Stopwatch,
    TooSlow,
    expert,
    replay,
    seeded,
    some,
    spread,
    stranger,
)

SPLITS = ("train", "validation", "test")
SAMPLE = 32
"""Tasks looked at per split."""
LONGEST = 60
"""Steps of a random episode."""
GROWTH_MB = 32.0
"""What a hosting process, with all that it started, may grow by over the counted resets."""
GONE_S = 10.0
"""How long a far end may take to go, once nobody speaks to it any more."""
UNANSWERED = "the episodes to look at could not be played"


class Skipped(Exception):
    """A check has nothing to look at; the message says why."""


@dataclass(frozen=True)
class Check:
    name: str
    outcome: Literal["ok", "failed", "skipped"]
    detail: str
    """What was seen, what was wrong, or why it was not looked at."""


@dataclass(frozen=True)
class CheckReport:
    environment: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return not any(check.outcome == "failed" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        checks = [asdict(check) for check in self.checks]
        return {"environment": self.environment, "ok": self.ok, "checks": checks}


@dataclass
class Examination:
    """What the single checks look at."""

    name: str
    config: dict[str, Any]
    fleet: Fleet
    episodes: int
    resets: int
    here: Worlds
    """Where episodes are played."""
    there: Worlds
    """In another process."""
    watch: Stopwatch
    played: list[Episode] = field(default_factory=list[Episode])
    answered: bool = False
    late: str = ""


async def check(
    name: str,
    config: dict[str, Any],
    fleet: Fleet | None = None,
    *,
    episodes: int = 8,
    resets: int = 200,
) -> CheckReport:
    """Examine the world called ``name``; whatever it does wrong is in the report.

    ``episodes``: how many are played for each of the checks that play. ``resets``: over how many
    memory must be flat; 0: not looked at. Deadlines are the fleet's.

    Raises:
        PluginError: there is no such world.
        pydantic.ValidationError: ``config`` is not the world's.
    """
    # In processes of their own even if it says that it never blocks: whether it does is to be seen.
    hosted = {"parallel": 2, "isolation": "process"}
    fleet = (fleet or Fleet.model_validate({})).model_copy(update=hosted)
    apart = fleet.model_copy(update={"parallel": 1})
    checks: list[Check] = []
    async with AsyncExitStack() as stack:
        try:
            here = await stack.enter_async_context(await open_worlds(name, config, fleet))
            there = await stack.enter_async_context(await open_worlds(name, config, apart))
        except (PluginError, ValidationError):
            raise
        except Exception as error:
            return CheckReport(name, (Check("opens", "failed", _words(error)),))
        checks.append(Check("opens", "ok", _abilities(here)))
        watch = Stopwatch(fleet)
        exam = Examination(name, config, fleet, episodes, resets, here, there, watch)
        for title, look in EXAMINATIONS.items():
            checks.append(await _outcome(title, look, exam))
    return CheckReport(name, tuple(checks))


def render(report: CheckReport) -> str:
    """A line per check."""
    marks = {"ok": "ok     ", "failed": "FAILED ", "skipped": "skipped"}
    width = max(len(check.name) for check in report.checks)
    lines = [f"{marks[c.outcome]}  {c.name:{width}}  {c.detail}" for c in report.checks]
    verdict = "keeps the contract" if report.ok else "does not keep the contract"
    return "\n".join([*lines, f"{report.environment} {verdict}"])


async def _outcome(
    title: str, look: Callable[[Examination], Awaitable[str]], exam: Examination
) -> Check:
    try:
        return Check(title, "ok", await look(exam))
    except Skipped as why:
        return Check(title, "skipped", str(why))
    except Broken as fault:
        return Check(title, "failed", str(fault))
    except Exception as error:
        return Check(title, "failed", _words(error))


async def _tasks(exam: Examination) -> str:
    """Tasks are tasks, the same on every call."""
    sizes: list[str] = []
    for split in SPLITS:
        tasks = exam.here.tasks(split)
        if not (size := await tasks.size()):
            raise Broken(f"{split} has no tasks; wanted at least one")
        places = spread(size, SAMPLE)
        looks = [await one.take(places) for one in (tasks, tasks, exam.there.tasks(split))]
        for index, one, *others in zip(places, *looks, strict=True):
            readable(one)
            for other in others:
                if one.id != other.id or not alike(one, other):
                    raise Broken(f"{split}[{index}] is {one!r}, asked again {other!r}")
        sizes.append(f"{size} {split}")
    return ", ".join(sizes)


async def _splits(exam: Examination) -> str:
    """No two splits share a task."""
    met: dict[str, tuple[str, Task]] = {}
    looked = 0
    for split in SPLITS:
        for task in await some(exam.here.tasks(split), 4 * SAMPLE):
            looked += 1
            home, first = met.setdefault(task.id, (split, task))
            if home != split:
                raise Broken(f"task {task.id!r} is in {home} and in {split}")
            same(first, task)
    return f"{looked} tasks sampled, {looked - len(met)} of them once more in their own split"


async def _answers(exam: Examination) -> str:
    """Resets and steps answer with what they should, whatever the action says."""
    try:
        turns = await _play_some(exam)
    except TooSlow as late:
        exam.late = str(late)
        raise
    exam.answered = True
    return f"{len(exam.played)} episodes, {turns} steps, {len(ODD_ACTIONS)} odd actions"


async def _play_some(exam: Examination) -> int:
    turns = 0
    async with exam.here.lease() as world:
        for number, task in enumerate(await _some(exam, "train")):
            shown = number % 2 and _has(exam, "expert")
            choose = expert if shown else _stranger(exam, number)
            episode = await exam.watch.play(world, task, seeded(number), choose, LONGEST)
            exam.played.append(episode)
            turns += len(episode.steps)
        task = await exam.here.tasks("train").at(0)
        for action in ODD_ACTIONS:
            await exam.watch.timed("reset", world.reset(task, seeded(0)))
            await exam.watch.timed("step", world.step(action))
    return turns


async def _deadlines(exam: Examination) -> str:
    if exam.late:
        raise Broken(exam.late)
    if not exam.answered:
        raise Skipped(UNANSWERED)
    slowest = exam.watch.slowest
    return f"slowest reset {slowest['reset']:.3f} s, slowest step {slowest['step']:.3f} s"


async def _same_process(exam: Examination) -> str:
    """The same seed and actions give the same episode, even while another like it is played."""
    rule = _rule(exam)
    async with exam.here.lease() as one, exam.here.lease() as other:
        for episode in exam.played:
            told = episode.task, episode.seed, replay(episode)
            _alike(episode, await exam.watch.play(one, *told), rule)
            for again in await asyncio.gather(
                exam.watch.play(one, *told), exam.watch.play(other, *told)
            ):
                _alike(episode, again, rule)
    return f"{len(exam.played)} episodes, each played three times more, two of them side by side"


async def _two_processes(exam: Examination) -> str:
    rule = _rule(exam)
    tasks = await some(exam.there.tasks("train"), exam.episodes)
    async with exam.there.lease() as world:
        for task, episode in zip(tasks, exam.played, strict=True):
            again = await exam.watch.play(world, task, episode.seed, replay(episode))
            _alike(episode, again, rule)
    return f"{len(exam.played)} episodes, played again in another process"


async def _snapshots(exam: Examination) -> str:
    """From a state that was taken another instance, in another process, goes on as it did."""
    if not (_has(exam, "snapshot") and _has(exam, "restore")):
        raise Skipped("the world takes no snapshots")
    compared = 0
    async with exam.here.lease() as one, exam.there.lease() as other:
        for episode in exam.played:
            for half in sorted({1, len(episode.steps) // 2} - {0, len(episode.steps)}):
                one.snapshots = True
                told = episode.task, episode.seed, replay(episode)
                await exam.watch.play(one, *told, longest=half)
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


async def _killed(exam: Examination) -> str:
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


async def _wire(exam: Examination) -> str:
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


async def _rewards(exam: Examination) -> str:
    least, most = exam.here.spec.reward_range
    sums = [sum(step.reward for step in episode.steps) for episode in exam.played]
    for episode, total in zip(exam.played, sums, strict=True):
        if not least - 1e-6 <= total <= most + 1e-6:
            raise Broken(
                f"an episode of {episode.task.id!r} paid {total:g}; wanted {least:g} to {most:g}, "
                "or a reward_range that says otherwise"
            )
    return f"episodes paid {min(sums):g} to {max(sums):g}, within {least:g} to {most:g}"


async def _experts(exam: Examination) -> str:
    """An expert that never gives up succeeds."""
    if not _has(exam, "expert"):
        raise Skipped("the world has no expert")
    shown: list[Episode] = []
    async with exam.here.lease() as world:
        for split in ("train", "validation"):
            for task in await _some(exam, split):
                shown.append(await exam.watch.play(world, task, seeded(len(shown)), expert))
    for episode in shown:
        if not episode.success and not episode.gave_up:
            raise Broken(
                f"the expert acted {len(episode.steps)} times on {episode.task.id!r} to the end "
                "and did not succeed; wanted success, or None once it knows no way"
            )
    solved = sum(episode.success for episode in shown)
    if not solved:
        raise Broken(f"the expert gave up on all of {len(shown)} tasks")
    return f"{solved} of {len(shown)} solved, {len(shown) - solved} given up"


async def _no_oracle(exam: Examination) -> str:
    """Without its oracle a world pays the same, and says nothing of it."""
    if not has_attempts(exam.here.abilities):
        raise Skipped("its actions are not whole attempts")
    if not _has(exam, "expert"):
        raise Skipped("without an expert there is no right attempt to try")
    fleet = exam.fleet
    mute = await open_worlds(exam.name, exam.config, fleet, without_oracle=True)
    compared = 0
    async with mute, mute.lease() as world:
        for number, task in enumerate(await some(mute.tasks("train"), exam.episodes)):
            wrong = await exam.watch.play(world, task, seeded(number), _stranger(exam, number))
            right = await exam.watch.play(world, task, seeded(number), expert)
            for episode in (wrong, right):
                _never_told(episode)
            if right.steps and max(step.reward for step in right.steps) < 1:
                raise Broken(
                    f"without its oracle {task.id!r} pays the expert's attempts "
                    f"{max(step.reward for step in right.steps):g}; wanted 1 for a right one"
                )
            compared += await _same_words(exam.here, wrong, right)
    return f"{exam.episodes} tasks, {compared} right attempts answered like wrong ones"


async def _memory(exam: Examination) -> str:
    """The hosting process does not grow from reset to reset."""
    if not exam.resets:
        raise Skipped("no resets were asked for")
    split = exam.there.tasks("train")
    tasks = await split.take(range(min(await split.size(), SAMPLE)))
    async with exam.there.lease() as world:

        async def resets(count: int) -> float:
            for number in range(count):
                task = tasks[number % len(tasks)]
                first = await exam.watch.timed("reset", world.reset(task, seeded(number)))
                action = await _stranger(exam, number)(world, first, 0)
                await exam.watch.timed("step", world.step(action or ""))
            return sum(map(_resident_mb, exam.there.processes))

        before = await resets(exam.resets)
        grown = await resets(exam.resets) - before
    seen = f"{grown:+.1f} MB over {exam.resets} resets, after as many to warm up"
    if grown > GROWTH_MB:
        raise Broken(f"{seen}; wanted at most {GROWTH_MB:g} MB")
    return f"{seen}, at {before + grown:.0f} MB"


def _after_answers(
    look: Callable[[Examination], Awaitable[str]],
) -> Callable[[Examination], Awaitable[str]]:
    async def guarded(exam: Examination) -> str:
        if not exam.answered:
            raise Skipped(UNANSWERED)
        return await look(exam)

    return guarded


EXAMINATIONS: dict[str, Callable[[Examination], Awaitable[str]]] = {
    "tasks": _tasks,
    "splits": _splits,
    "answers": _answers,
    "deadlines": _deadlines,
    "same process": _after_answers(_same_process),
    "two processes": _after_answers(_two_processes),
    "snapshots": _after_answers(_snapshots),
    "killed": _after_answers(_killed),
    "wire": _wire,
    "rewards": _after_answers(_rewards),
    "expert": _after_answers(_experts),
    "no oracle": _after_answers(_no_oracle),
    "memory": _after_answers(_memory),
}


def _has(exam: Examination, ability: str) -> bool:
    return ability in exam.here.abilities


def _abilities(worlds: Worlds) -> str:
    known = {"expert": "an expert", "random": "random actions", "snapshot": "snapshots"}
    found = [name for ability, name in known.items() if ability in worlds.abilities]
    if has_attempts(worlds.abilities):
        found.append("attempts")
    return f"with {', '.join(found) or 'nothing optional'}"


async def _some(exam: Examination, split: str) -> list[Task]:
    return await some(exam.here.tasks(split), exam.episodes)


def _stranger(exam: Examination, seed: int) -> Chooser:
    return stranger(_has(exam, "random"), seed)


def _rule(exam: Examination) -> str:
    """How far the world says that it repeats itself. Raises: Skipped: not at all."""
    rule = exam.here.spec.repeatable
    if rule == "no":
        raise Skipped("the world says that nothing of it repeats itself")
    return rule


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


def _never_told(episode: Episode) -> None:
    for turn, step in enumerate(episode.steps, start=1):
        if step.success or step.terminated:
            raise Broken(
                f"without its oracle {episode.task.id!r} ended at attempt {turn}, which tells that "
                "it was right; wanted max_steps attempts, whatever they are worth"
            )


async def _same_words(worlds: Worlds, wrong: Episode, right: Episode) -> int:
    """How many right attempts were compared to a wrong one of the same turn."""
    compared = 0
    for turn, (one, other) in enumerate(zip(wrong.steps, right.steps, strict=False)):
        answers = [await worlds.answer(wrong.task, e.actions[turn]) for e in (wrong, right)]
        if None in answers or one.reward >= other.reward:
            continue
        # Either answer may stand in either text: the right one is often part of the task.
        said = [one.observation.text, other.observation.text]
        for answer in sorted(map(str, answers), key=len, reverse=True):
            said = [text.replace(answer, "...") for text in said]
        if said[0] != said[1]:
            raise Broken(
                f"without its oracle {wrong.task.id!r} answers a wrong attempt {said[0]!r} "
                f"and a right one {said[1]!r}; wanted the same but for the answer itself"
            )
        compared += 1
    return compared


def _resident_mb(pid: int) -> float:
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_info().rss for member in family) / 2**20


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 160 else text[:157] + "..."


def _words(error: Exception) -> str:
    # What a world raised in another process is a WorldError by the name that it had there.
    name = "" if type(error) is WorldError and str(error) else f"{type(error).__name__}: "
    return f"{name}{error}"
