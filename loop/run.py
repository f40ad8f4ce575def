"""The whole loop, top to bottom: play, judge, learn, again; then prove it."""

import asyncio
import math
import shutil
from collections.abc import Awaitable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..core import evaluation as files
from ..core.config import PolicyConfig
from ..core.draft import unreplayable
from ..core.errors import LearnerError, RecipeError, StoreError
from ..core.files import read_json, write_json
from ..core.hosting.pool import Worlds, open_worlds
from ..core.images import FOLDER as IMAGES
from ..core.images import STORE
from ..core.models.open import save_merged
from ..core.models.origin import layers_of, note_base
from ..core.play.briefing import briefed, wants_briefing
from ..core.play.draw import draw, starts
from ..core.play.rollout import rollouts
from ..core.protocols import (
    Agent,
    HasFindings,
    HasGuards,
    HasMemory,
    HasStarts,
    Judge,
    LearnerFactory,
    LooksFirst,
    Trainer,
    make_learner,
    replays,
)
from ..core.recipe import Recipe, differences, section
from ..core.sections import Section
from ..core.seeds import derive
from ..core.store import write_trajectories
from ..core.store.folder import RunFolder, iteration_name, iterations
from ..core.types import Judged, Metrics, Stop, Task
from ..evidence.report import report
from .components import Components
from .evaluate import AGENT, drawn, evaluate, exam_tasks, judge_of, tokens_sampled
from .events import AlarmRaised, Evaluated, IterationEnded, Listener, RunBegan, RunEnded, ignore
from .measure import Clock, staleness, summary, together
from .prefetch import Prefetcher
from .progress import Progress
from .ready import check
from .result import BASE, conclude, phase_base, phase_name
from .spending import LEAST, Costs, committed, room
from .warm_start import key_of, made_as, made_here, prepare

PATIENCE = 3
"""Iterations in a row from which nothing could be learned, after which a run stops."""


LOOKED_AT = 32
"""Training tasks that a run looks at before it plays anything."""


class Alarm(Exception):
    """A trainer found that what it learns from can no longer be trusted.

    ``trusted``: after so many of the phase's iterations what was learned was best.
    """

    def __init__(self, why: str, trusted: int) -> None:
        super().__init__(why)
        self.trusted = trusted


async def run(
    recipe: Recipe,
    output: Path,
    listener: Listener = ignore,
    learner_factory: LearnerFactory = make_learner,
) -> dict[str, Any]:
    """Run ``recipe``, or go on with it, in the folder ``output``; what ``result.json`` holds.

    ``listener`` hears how it goes; ``learner_factory`` makes its learners.

    Raises:
        SelfwrightError: it says what went wrong; what was committed stays, and the same command
            goes on from there.
    """
    progress = Progress(listener)
    with (
        RunFolder.open(output, recipe.dump(), differences) as kept,
        STORE.kept_in(kept.path(IMAGES)),
    ):
        if kept.has("result.json"):
            progress.say(f"{output} holds a finished run; this is its result")
            if not kept.has("report.html"):
                progress.say(f"report: {report(output)}")
            return read_json(kept.path("result.json"))
        check(recipe, str(kept.path(BASE)) if kept.has(BASE) else policy_of(recipe).model)
        details = (recipe.dump(), recipe.report_to, recipe.iterations, kept.finished)
        listener(RunBegan(recipe.name, output, *details))
        result: dict[str, Any] | None = None
        try:
            result = await whole(recipe, kept, progress, learner_factory)
            progress.say(f"report: {report(output)}")
            return result
        finally:
            listener(RunEnded(result))


async def whole(
    recipe: Recipe, kept: RunFolder, progress: Progress, learner_factory: LearnerFactory
) -> dict[str, Any]:
    """A run from its worlds to its result."""
    settings = recipe.environment.config.model_dump(mode="json")
    async with await open_worlds(recipe.environment.use, settings, recipe.fleet) as worlds:
        for phase in recipe.phases:
            # Of a world elsewhere it is known only now.
            if fault := unreplayable(phase.trainer, worlds.spec, recipe.environment.use):
                raise RecipeError(fault)
        await look_at_tasks(recipe, worlds, progress)
        recipe = replace(recipe, agent=await briefed_agent(recipe, worlds, kept))
        judge: Judge = recipe.judge.make()
        base = await begun(recipe, worlds, kept, progress, learner_factory)
        agent: Agent = recipe.agent.make()
        components = Components(recipe, worlds, agent, judge, progress, learner_factory)
        try:
            learned = await improve(components, kept, base)
        finally:
            await components.close()
    return conclude(recipe, base, components.stopped, learned, kept)


async def briefed_agent(recipe: Recipe, worlds: Worlds, kept: RunFolder) -> Section:
    """The recipe's agent, told of its world; one that has begun is told nothing else later."""
    if not wants_briefing(recipe.agent):
        kept.path(AGENT).unlink(missing_ok=True)  # Of another recipe, that came to nothing here.
        return recipe.agent
    if kept.begun and kept.has(AGENT):
        settings = read_json(kept.path(AGENT))
        return section("agent", settings.pop("use"), settings=settings)[0]
    agent = await briefed(recipe.agent, worlds, recipe.seed)
    write_json(kept.path(AGENT), agent.dump())
    return agent


async def look_at_tasks(recipe: Recipe, worlds: Worlds, progress: Progress) -> None:
    """Before anything is played: all that is evaluated on, and some of what is trained on.

    Raises:
        WorldError: some are no tasks, or two share an id.
    """
    settings = recipe.evaluation
    await exam_tasks(worlds, settings.split, settings.tasks, recipe.seed, progress)
    if settings.every:
        await validation_tasks(recipe, worlds, progress)
    tasks = worlds.tasks("train")
    if await tasks.size():
        await draw(tasks, LOOKED_AT, derive(recipe.seed, "look"))


async def validation_tasks(recipe: Recipe, worlds: Worlds, progress: Progress) -> list[Task]:
    count, seed = recipe.evaluation.validation_tasks, derive(recipe.seed, "validation")
    return await drawn(worlds, "validation", count, seed, progress)


async def begun(
    recipe: Recipe,
    worlds: Worlds,
    kept: RunFolder,
    progress: Progress,
    learner_factory: LearnerFactory,
) -> str:
    """The base model: a plain one, that is no adapter, nor a run.

    One made here is kept with the run, which then needs no other place; and so is what an adapter
    makes of its base, as what is learned stands on both.
    """
    made_anew = made_here(policy_of(recipe)) and not kept.begun
    if kept.has(BASE) and made_anew and made_as(kept.path(BASE)) != key_of(recipe):
        kept.discard(BASE)  # Of a world that was another one then.
    if not kept.has(BASE):
        model = await prepare(recipe, worlds, progress, learner_factory)
        plain, adapters = layers_of(model)
        if not adapters and not made_here(policy_of(recipe)):
            return plain
        with kept.draft(BASE) as folder:
            if adapters:
                save_merged(model, folder, trusting(recipe))
            else:
                shutil.copytree(model, folder, dirs_exist_ok=True)
    return str(kept.path(BASE).resolve())


def policy_of(recipe: Recipe) -> PolicyConfig:
    """What every engine knows of the policy in training."""
    config = recipe.policy.config
    assert isinstance(config, PolicyConfig)
    return config


def trusting(recipe: Recipe) -> bool:
    """Whether code that comes with the policy's model may be run."""
    return bool(getattr(recipe.policy.config, "trust_remote_code", False))


async def improve(components: Components, kept: RunFolder, base: str) -> int:
    """Every iteration that is not committed yet, between evaluations on the same tasks.

    A phase's base is what the phase before it has come to.

    Returns:
        After how many iterations the run had learned what it has come to: all of them, or fewer if
        an alarm took it back.
    """
    recipe, begin, learned = components.recipe, 0, 0
    for number, phase in enumerate(recipe.phases):
        last = number + 1 == len(recipe.phases)
        if kept.has(phase_base(number + 1)):
            begin += phase.iterations  # The next one has begun.
            continue
        if kept.finished < begin:
            break  # The budget was spent before this phase.
        await components.start(
            phase, str(kept.path(phase_base(number)).resolve()) if number else base
        )
        trainer: Trainer = phase.trainer.make(components.context)
        await looked(trainer)
        if replays(phase.trainer.plugin):
            components.worlds.keep_snapshots()
        if not number:
            # Before anything is played: what cannot be opened or is unfit is better known now.
            for other in recipe.phases[1:]:
                await looked(other.trainer.make(components.context))
            await evaluated(components, kept, "base")
        if kept.finished > begin:
            done = kept.path(iteration_name(kept.finished - 1))
            if isinstance(trainer, HasMemory):
                trainer.restore(done / "trainer")
            components.learner.restore(learner_state(kept, done))
            await components.policy.load(done / "checkpoint")
            components.progress.say(
                f"resuming after iteration {kept.finished} of {recipe.iterations}"
            )
        try:
            await rounds(components, trainer, kept, begin)
        except Alarm as alarm:
            learned = begin + alarm.trusted
            await components.policy.load(kept.path(iteration_name(learned - 1)) / "checkpoint")
            components.stopped = (
                f"after iteration {kept.finished} of {recipe.iterations}: {alarm}; back to what "
                f"it had learned after iteration {learned}"
            )
            components.progress.tell(AlarmRaised(components.stopped))
            break
        begin += phase.iterations
        if kept.finished < begin or committed(kept).share(recipe.budget) >= 1:
            components.progress.say(f"the budget is spent after iteration {kept.finished}")
            break
        if not last:
            await evaluated(components, kept, phase_name(number))
            with kept.draft(phase_base(number + 1)) as folder:
                ended = kept.path(iteration_name(begin - 1)) / "checkpoint"
                save_merged(str(ended), folder, trusting(recipe))
    await evaluated(components, kept, "final")
    return learned or kept.finished


async def looked(trainer: object) -> None:
    """Raises: RecipeError: what the trainer was given is not fit."""
    if isinstance(trainer, LooksFirst):
        await trainer.begin()


async def rounds(components: Components, trainer: Trainer, kept: RunFolder, begin: int) -> None:
    """The iterations of a phase that are left, each committed by itself; ``begin`` is its first.

    Raises:
        Alarm: the trainer's. The iteration it was raised in is kept, but nothing was learned in it.
    """
    recipe = components.recipe
    if isinstance(trainer, HasGuards) and trainer.alarm:
        raise Alarm(trainer.alarm, trainer.trusted)  # Raised before the run was killed.
    components.version, components.asked = kept.finished, 0
    end = begin + components.phase.iterations
    prefetcher = Prefetcher(partial(play, components, trainer), recipe, end)
    try:
        for index in range(max(begin, kept.finished), end):
            components.spent = spent = committed(kept)
            each = each_of(kept, begin)
            if room(spent, each, recipe.budget) < LEAST:
                break
            done = max((index - begin) / components.phase.iterations, spent.share(recipe.budget))
            prefetcher.begin(index, spent, each)
            await iteration(components, trainer, kept, index, done, prefetcher.rounds[index])
            del prefetcher.rounds[index]
            prune(kept, recipe.keep)
            if isinstance(trainer, HasGuards) and trainer.alarm:
                raise Alarm(trainer.alarm, trainer.trusted)
            watch(kept, begin, index)
    finally:
        await prefetcher.end()


async def iteration(
    components: Components,
    trainer: Trainer,
    kept: RunFolder,
    index: int,
    done: float,
    played: Awaitable[list[Judged]],
) -> None:
    """Learn from what is being played, and commit it."""
    recipe, policy = components.recipe, components.policy
    with kept.draft(iteration_name(index)) as folder:
        metrics = await iterate(components, trainer, index, done, played)
        clock = Clock()
        # Off the loop: the first time takes a while, and others play meanwhile.
        export = components.learner.export
        await asyncio.get_running_loop().run_in_executor(None, export, folder / "checkpoint")
        note_base(folder / "checkpoint", components.base)
        components.learner.save(folder / "learner")
        images = kept.path(IMAGES)
        write_trajectories(folder, components.played, images, judge_of(components.phase.judge))
        if isinstance(trainer, HasMemory):
            (folder / "trainer").mkdir()
            trainer.save(folder / "trainer", images)
        metrics["time/store_s"] = clock.lap()
        await policy.load(folder / "checkpoint")
        components.version = index + 1
        metrics |= await validated(components, index)
        write_json(folder / "metrics.json", metrics)
    # The draft has its final name now; the weights are to be known by that.
    await policy.load(kept.path(iteration_name(index)) / "checkpoint")
    components.progress.tell(IterationEnded(index, recipe.iterations, metrics))


def learner_state(kept: RunFolder, done: Path) -> Path:
    """Where the learner's state after iteration ``done`` is. Raises: StoreError: it was removed."""
    if not (done / "learner").is_dir():
        every = [one.name for one in iterations(kept.folder) if (one / "learner").is_dir()]
        raise StoreError(
            f"{done}/learner is not there: of most iterations `keep` removes the learner's state. "
            f"A run can go on from {', '.join(every) or 'none of them'}: remove those after it"
        )
    return done / "learner"


def prune(kept: RunFolder, keep: int | None) -> None:
    """Remove what only going on from an iteration takes, but of the last ones and the best."""
    if keep is None:
        return
    every = range(kept.finished)
    measured = [read_json(kept.path(iteration_name(k)) / "metrics.json") for k in every]
    scores = [one.get("validation/success", -1.0) for one in measured]
    best = max(every, key=lambda k: (scores[k], k), default=None)
    for k in every[:-keep]:
        if k != best:
            kept.discard(f"{iteration_name(k)}/learner")


def each_of(kept: RunFolder, begin: int) -> Costs:
    """What an iteration costs on average: of the phase that begins there, if it has any yet."""
    since = begin if kept.finished > begin else 0
    count = kept.finished - since
    return Costs().and_more(committed(kept, since), 1 / count) if count else Costs()


async def play(
    components: Components, trainer: Trainer, index: int, spent: Costs, share: float
) -> list[Judged]:
    """The episodes that iteration ``index`` begins with, judged.

    Of its tasks no more than the budget covers, all else that the iteration will play included.

    Args:
        spent: what is spent before it.
        share: how much of an iteration, or how many, the budget covers then.
    """
    plan, seed = trainer.plan, derive(components.recipe.seed, "iteration", index)
    worlds = components.worlds
    if isinstance(trainer, HasStarts):
        begin = await trainer.starts(worlds.tasks("train"), index, seed)
    elif plan.tasks:
        drawing = derive(seed, "tasks")
        tasks = await drawn(worlds, "train", plan.tasks, drawing, components.progress)
        tasks = tasks[: math.ceil(min(1.0, share) * len(tasks))]
        begin = starts(tasks, plan.attempts, seed, plan.turns)
    else:
        return []
    player = components.player_named(plan.player)
    begin = components.afforded(player, begin, spent, ())
    what = f"iteration {index + 1}: playing"
    return await components.round(player, begin, seed, what)


async def iterate(
    components: Components,
    trainer: Trainer,
    index: int,
    progress: float,
    played: Awaitable[list[Judged]],
) -> Metrics:
    """Have played, learn once. All of the iteration's episodes stay in ``components.played``."""
    clock = Clock()
    given = await played
    components.seed = derive(components.recipe.seed, "iteration", index)
    components.played, components.rounds = [*given], 0
    batches = await trainer.batches(given)
    metrics = {"time/rollout_s": clock.lap()} | summary(components.played, components.asked)
    metrics |= staleness(components.played, components.version)
    components.asked = 0
    if isinstance(trainer, HasFindings):
        metrics |= trainer.findings
    if isinstance(trainer, HasGuards) and trainer.alarm:
        batches = []
    loop = asyncio.get_running_loop()
    learned: list[Metrics] = []
    with components.progress.stage(f"iteration {index + 1}: learning"):
        for batch in batches:
            if batch.examples:
                # In a thread, so that deadlines and signals are served while it computes.
                update = loop.run_in_executor(None, components.learner.update, batch, progress)
                learned.append(await update)
    return metrics | together(learned) | {"time/learn_s": clock.lap()}


async def validated(components: Components, index: int) -> Metrics:
    """A point of the learning curve, on validation tasks that nothing is trained on."""
    settings = components.recipe.evaluation
    if not settings.every or (index + 1) % settings.every:
        return {}
    clock = Clock()
    seed = derive(components.recipe.seed, "validation")
    tasks = await validation_tasks(components.recipe, components.worlds, components.progress)
    player = components.player(settings.temperature)
    begin, what = starts(tasks, 1, seed), f"iteration {index + 1}: validating"
    with components.progress.stage(what, len(begin)) as stage:
        played = await rollouts(
            player, components.worlds, begin, seed, stage.advance, stepped=stage.stepped
        )
    return {
        "validation/success": sum(t.success for t in played) / len(played),
        "validation/tasks": float(len(played)),
        "validation/failed": float(sum(t.stop == Stop.FAILED for t in played)),
        "validation/environment_steps": float(sum(t.executed for t in played)),
        "validation/tokens": float(tokens_sampled(played)),
        "time/validation_s": clock.lap(),
    }


async def evaluated(components: Components, kept: RunFolder, name: str) -> None:
    """``evaluations/NAME``, unless it is there already."""
    if kept.has(f"evaluations/{name}"):
        return
    player = components.player(components.eval_spec.temperature)
    eval_spec, judge = components.eval_spec, components.evaluation_judge
    origin = f"{components.recipe.identity} {name}"
    result, episodes = await evaluate(
        eval_spec, player, judge, components.worlds, components.progress, name, origin
    )
    with kept.draft(f"evaluations/{name}") as folder:
        files.write(folder, result)
        write_trajectories(folder, episodes, kept.path(IMAGES), judge_of(eval_spec.judge))
    components.progress.tell(Evaluated(name, kept.finished, result))


def watch(kept: RunFolder, begin: int, index: int) -> None:
    """Raises: LearnerError: the phase's last iterations had nothing to learn from."""
    recent = [
        read_json(kept.path(iteration_name(k)) / "metrics.json")
        for k in range(max(begin, index + 1 - PATIENCE), index + 1)
    ]
    if len(recent) == PATIENCE and not any(m.get("train/examples") for m in recent):
        score = recent[-1].get("judge/score", "undefined")
        raise LearnerError(
            f"nothing is being learned: the trainer found no example in {PATIENCE} iterations "
            f"(mean score {score}, {recent[-1]['judge/undecided']:.0f} undecided, "
            f"{recent[-1]['rollout/failed']:.0f} failed); warm the policy up, make the tasks "
            "easier, or loosen the trainer's filter"
        )
