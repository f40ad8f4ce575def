"""Tests a world against its contract, on tasks of its own."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any, Literal, TypeVar

import psutil
from pydantic import ValidationError

from ..core.checked import alike, answer_of, readable, same
from ..core.config import Fleet
from ..core.errors import PluginError, WorldError
from ..core.hosting.worlds import World, Worlds, open_worlds, spec_of
from ..core.plugins import load
from ..core.protocols import HasAttempts, HasExpert, HasRandom
from ..core.seeds import derive
from ..core.types import Observation, Task, TimeStep

T = TypeVar("T")

SPLITS = ("train", "validation", "test")
SAMPLE = 32
"""Tasks looked at per split."""
LONGEST = 60
"""Steps of a random episode."""
GROWTH_MB = 32.0
"""What a hosting process, with all that it started, may grow by over the counted resets."""
UNANSWERED = "the episodes to look at could not be played"
ODD_ACTIONS = ("", " ", "no such action", "do\n\nthis", "\u2603 {}[]()\"'\\", "x" * 5000)


class Skipped(Exception):
    """A check has nothing to look at; the message says why."""


class Broken(Exception):
    """The world does not keep the contract; the message says how."""


class TooSlow(Broken):
    """A call took longer than its deadline."""


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


@dataclass(frozen=True)
class Episode:
    task: Task
    seed: int
    actions: tuple[str, ...]
    first: Observation
    steps: tuple[TimeStep, ...]
    gave_up: bool
    """Whoever chose the actions knew no further one."""

    @property
    def seen(self) -> tuple[object, ...]:
        return (self.first, *self.steps)

    @property
    def success(self) -> bool:
        return bool(self.steps) and self.steps[-1].success


Chooser = Callable[[World, Observation, int], Awaitable[str | None]]
"""``chooser(world, observation, turn)``: the next action, or None."""


class Stopwatch:
    """Plays episodes under deadlines, and remembers the slowest calls."""

    def __init__(self, fleet: Fleet) -> None:
        self._limits = {"reset": fleet.reset_timeout_s, "step": fleet.step_timeout_s}
        self.slowest = {"reset": 0.0, "step": 0.0}

    async def timed(self, what: str, call: Awaitable[T]) -> T:
        begin, limit = time.perf_counter(), self._limits[what]
        try:
            async with asyncio.timeout(limit):
                result = await call
        except TimeoutError:
            raise TooSlow(f"a {what} took longer than {limit:g} s") from None
        self.slowest[what] = max(self.slowest[what], time.perf_counter() - begin)
        return result

    async def play(
        self, world: World, task: Task, seed: int, choose: Chooser, longest: float = inf
    ) -> Episode:
        first = await self.timed("reset", world.reset(task, seed))
        actions, steps, observation, gave_up = list[str](), list[TimeStep](), first, False
        while len(steps) < min(task.max_steps, longest):
            action = await self.timed("step", choose(world, observation, len(steps)))
            if action is None:
                gave_up = True
                break
            step = await self.timed("step", world.step(action))
            actions.append(action)
            steps.append(step)
            observation = step.observation
            if step.terminated or step.truncated:
                break
        return Episode(task, seed, tuple(actions), first, tuple(steps), gave_up)


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
        if not len(tasks):
            raise Broken(f"{split} has no tasks; wanted at least one")
        again, there = exam.here.tasks(split), exam.there.tasks(split)
        for index in _spread(len(tasks), SAMPLE):
            one = tasks[index]
            readable(one)
            for other in (again[index], there[index]):
                if one.id != other.id or not alike(one, other):
                    raise Broken(f"{split}[{index}] is {one!r}, asked again {other!r}")
        sizes.append(f"{len(tasks)} {split}")
    return ", ".join(sizes)


async def _splits(exam: Examination) -> str:
    """No two splits share a task."""
    met: dict[str, tuple[str, Task]] = {}
    looked = 0
    for split in SPLITS:
        tasks = exam.here.tasks(split)
        for index in _spread(len(tasks), 4 * SAMPLE):
            task = tasks[index]
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
        for number, task in enumerate(_some(exam, "train")):
            choose = _expert if number % 2 and _has(exam, HasExpert) else _stranger(exam, number)
            episode = await exam.watch.play(world, task, _seed(number), choose, LONGEST)
            exam.played.append(episode)
            turns += len(episode.steps)
        task = exam.here.tasks("train")[0]
        for action in ODD_ACTIONS:
            await exam.watch.timed("reset", world.reset(task, _seed(0)))
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
    async with exam.here.lease() as one, exam.here.lease() as other:
        for episode in exam.played:
            _alike(
                episode, await exam.watch.play(one, episode.task, episode.seed, _replay(episode))
            )
            both = await asyncio.gather(
                exam.watch.play(one, episode.task, episode.seed, _replay(episode)),
                exam.watch.play(other, episode.task, episode.seed, _replay(episode)),
            )
            for again in both:
                _alike(episode, again)
    return f"{len(exam.played)} episodes, each played three times more, two of them side by side"


async def _two_processes(exam: Examination) -> str:
    tasks = exam.there.tasks("train")
    indices = _spread(len(tasks), exam.episodes)
    async with exam.there.lease() as world:
        for index, episode in zip(indices, exam.played, strict=True):
            replay = _replay(episode)
            _alike(episode, await exam.watch.play(world, tasks[index], episode.seed, replay))
    return f"{len(exam.played)} episodes, played again in another process"


async def _rewards(exam: Examination) -> str:
    least, most = spec_of(load("environments", exam.name)).reward_range
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
    if not _has(exam, HasExpert):
        raise Skipped("the world has no expert")
    shown: list[Episode] = []
    async with exam.here.lease() as world:
        for split in ("train", "validation"):
            for task in _some(exam, split):
                shown.append(await exam.watch.play(world, task, _seed(len(shown)), _expert))
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
    sample = exam.here.sample
    if not isinstance(sample, HasAttempts):
        raise Skipped("its actions are not whole attempts")
    if not _has(exam, HasExpert):
        raise Skipped("without an expert there is no right attempt to try")
    fleet = exam.fleet
    mute = await open_worlds(exam.name, exam.config, fleet, without_oracle=True)
    compared = 0
    async with mute, mute.lease() as world:
        for number, task in enumerate(_mapped(mute, "train", exam.episodes)):
            stranger = _stranger(exam, number)
            wrong = await exam.watch.play(world, task, _seed(number), stranger)
            right = await exam.watch.play(world, task, _seed(number), _expert)
            for episode in (wrong, right):
                _never_told(episode)
            if right.steps and max(step.reward for step in right.steps) < 1:
                raise Broken(
                    f"without its oracle {task.id!r} pays the expert's attempts "
                    f"{max(step.reward for step in right.steps):g}; wanted 1 for a right one"
                )
            compared += _same_words(sample, wrong, right)
    return f"{exam.episodes} tasks, {compared} right attempts answered like wrong ones"


async def _memory(exam: Examination) -> str:
    """The hosting process does not grow from reset to reset."""
    if not exam.resets:
        raise Skipped("no resets were asked for")
    tasks = exam.there.tasks("train")
    async with exam.there.lease() as world:

        async def resets(count: int) -> float:
            for number in range(count):
                task = tasks[number % min(len(tasks), SAMPLE)]
                first = await exam.watch.timed("reset", world.reset(task, _seed(number)))
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
    "rewards": _after_answers(_rewards),
    "expert": _after_answers(_experts),
    "no oracle": _after_answers(_no_oracle),
    "memory": _after_answers(_memory),
}


async def _expert(world: World, observation: Observation, turn: int) -> str | None:
    return await world.expert()


def _stranger(exam: Examination, seed: int) -> Chooser:
    """Acts at random, by whatever means the world offers."""

    async def choose(world: World, observation: Observation, turn: int) -> str | None:
        if observation.actions:
            return random.Random(f"{seed} {turn}").choice(observation.actions)
        if _has(exam, HasRandom):
            return await world.random(_seed(seed, turn))
        return ODD_ACTIONS[turn % len(ODD_ACTIONS)]

    return choose


def _seed(*parts: int) -> int:
    """One as wide as those of runs."""
    return derive("check", *parts)


def _replay(episode: Episode) -> Chooser:
    async def choose(world: World, observation: Observation, turn: int) -> str | None:
        return episode.actions[turn] if turn < len(episode.actions) else None

    return choose


def _has(exam: Examination, ability: type) -> bool:
    return isinstance(exam.here.sample, ability)


def _abilities(worlds: Worlds) -> str:
    kinds = {"an expert": HasExpert, "random actions": HasRandom, "attempts": HasAttempts}
    found = [name for name, kind in kinds.items() if isinstance(worlds.sample, kind)]
    return f"with {', '.join(found) or 'nothing optional'}"


def _some(exam: Examination, split: str) -> list[Task]:
    return _mapped(exam.here, split, exam.episodes)


def _mapped(worlds: Worlds, split: str, count: int) -> list[Task]:
    tasks = worlds.tasks(split)
    return [tasks[index] for index in _spread(len(tasks), count)]


def _spread(length: int, count: int) -> list[int]:
    """Up to ``count`` indices, from the first to the last."""
    if length <= count:
        return list(range(length))
    return [place * (length - 1) // max(1, count - 1) for place in range(count)]


def _alike(episode: Episode, again: Episode) -> None:
    for turn, (one, other) in enumerate(zip(episode.seen, again.seen, strict=False)):
        if one != other:
            when = f"after action {turn}, {episode.actions[turn - 1]!r}," if turn else "after reset"
            raise Broken(
                f"{episode.task.id!r} with seed {episode.seed} does not repeat itself: {when} "
                f"once {_short(one)}, then {_short(other)}"
            )
    if len(episode.seen) != len(again.seen):
        raise Broken(f"{episode.task.id!r} once ended later than with the same seed before")


def _never_told(episode: Episode) -> None:
    for turn, step in enumerate(episode.steps, start=1):
        if step.success or step.terminated:
            raise Broken(
                f"without its oracle {episode.task.id!r} ended at attempt {turn}, which tells that "
                "it was right; wanted max_steps attempts, whatever they are worth"
            )


def _same_words(sample: HasAttempts, wrong: Episode, right: Episode) -> int:
    """How many right attempts were compared to a wrong one of the same turn."""
    compared = 0
    for turn, (one, other) in enumerate(zip(wrong.steps, right.steps, strict=False)):
        answers = [answer_of(sample, wrong.task, e.actions[turn]) for e in (wrong, right)]
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
