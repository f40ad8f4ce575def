"""What a world gives: tasks, answers, rewards, and how much memory it takes."""

import psutil

from ...core.checked import alike, readable, same
from ...core.hosting.pool import Worlds, open_worlds
from ...core.hosting.spec import has_attempts
from ...core.types import Task
from .episodes import (
    ODD_ACTIONS,
    Broken,
    Episode,
    TooSlow,
    expert,
    seeded,
    some,
    spread,
)
from .examination import UNANSWERED, Examination, Skipped, chooser, has, some_tasks

SPLITS = ("train", "validation", "test")
SAMPLE = 32
"""Tasks looked at per split."""
LONGEST = 60
"""Steps of a random episode."""
GROWTH_MB = 32.0
"""What a hosting process, with all that it started, may grow by over the counted resets."""


async def tasks(exam: Examination) -> str:
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


async def splits(exam: Examination) -> str:
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


async def answers(exam: Examination) -> str:
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
        for number, task in enumerate(await some_tasks(exam, "train")):
            shown = number % 2 and has(exam, "expert")
            choose = expert if shown else chooser(exam, number)
            episode = await exam.watch.play(world, task, seeded(number), choose, LONGEST)
            exam.played.append(episode)
            turns += len(episode.steps)
        task = await exam.here.tasks("train").at(0)
        for action in ODD_ACTIONS:
            await exam.watch.timed("reset", world.reset(task, seeded(0)))
            await exam.watch.timed("step", world.step(action))
    return turns


async def deadlines(exam: Examination) -> str:
    if exam.late:
        raise Broken(exam.late)
    if not exam.answered:
        raise Skipped(UNANSWERED)
    slowest = exam.watch.slowest
    return f"slowest reset {slowest['reset']:.3f} s, slowest step {slowest['step']:.3f} s"


async def rewards(exam: Examination) -> str:
    least, most = exam.here.spec.reward_range
    sums = [sum(step.reward for step in episode.steps) for episode in exam.played]
    for episode, total in zip(exam.played, sums, strict=True):
        if not least - 1e-6 <= total <= most + 1e-6:
            raise Broken(
                f"an episode of {episode.task.id!r} paid {total:g}; wanted {least:g} to {most:g}, "
                "or a reward_range that says otherwise"
            )
    return f"episodes paid {min(sums):g} to {max(sums):g}, within {least:g} to {most:g}"


async def experts(exam: Examination) -> str:
    """An expert that never gives up succeeds."""
    if not has(exam, "expert"):
        raise Skipped("the world has no expert")
    shown: list[Episode] = []
    async with exam.here.lease() as world:
        for split in ("train", "validation"):
            for task in await some_tasks(exam, split):
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


async def no_oracle(exam: Examination) -> str:
    """Without its oracle a world pays the same, and says nothing of it."""
    if not has_attempts(exam.here.abilities):
        raise Skipped("its actions are not whole attempts")
    if not has(exam, "expert"):
        raise Skipped("without an expert there is no right attempt to try")
    fleet = exam.fleet
    mute = await open_worlds(exam.name, exam.config, fleet, without_oracle=True)
    compared = 0
    async with mute, mute.lease() as world:
        for number, task in enumerate(await some(mute.tasks("train"), exam.episodes)):
            wrong = await exam.watch.play(world, task, seeded(number), chooser(exam, number))
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


async def memory(exam: Examination) -> str:
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
                action = await chooser(exam, number)(world, first, 0)
                await exam.watch.timed("step", world.step(action or ""))
            return sum(map(_resident_mb, exam.there.processes))

        before = await resets(exam.resets)
        grown = await resets(exam.resets) - before
    seen = f"{grown:+.1f} MB over {exam.resets} resets, after as many to warm up"
    if grown > GROWTH_MB:
        raise Broken(f"{seen}; wanted at most {GROWTH_MB:g} MB")
    return f"{seen}, at {before + grown:.0f} MB"


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
        shown = [one.observation.text, other.observation.text]
        for answer in sorted(map(str, answers), key=len, reverse=True):
            shown = [text.replace(answer, "...") for text in shown]
        if shown[0] != shown[1]:
            raise Broken(
                f"without its oracle {wrong.task.id!r} answers a wrong attempt {shown[0]!r} "
                f"and a right one {shown[1]!r}; wanted the same but for the answer itself"
            )
        compared += 1
    return compared


def _resident_mb(pid: int) -> float:
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_info().rss for member in family) / 2**20
