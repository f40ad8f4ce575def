"""The whole loop, top to bottom: play, judge, learn, again; then prove it."""

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Console

from ..core import evaluation as files
from ..core.asking import patient
from ..core.config import JudgeConfig, PolicyConfig
from ..core.draw import draw, starts
from ..core.errors import LearnerError
from ..core.files import read_json, write_json
from ..core.judging import BROKEN, judged
from ..core.protocols import (
    Agent,
    AsksPolicies,
    Attempt,
    Context,
    HasFindings,
    HasGuards,
    HasMemory,
    HasNamedTasks,
    Judge,
    Learner,
    Policy,
    Trainer,
)
from ..core.recipe import Phase, Recipe, differences
from ..core.rollout import ExpertPlayer, Player, failures_by_name, rollouts
from ..core.run import Run, iteration_name
from ..core.seeds import derive
from ..core.store import TRAJECTORIES, write_trajectories
from ..core.types import Completion, Judged, Metrics, Start, Stop, Task
from ..core.worlds import Worlds, open_worlds
from .base import made_here, prepare
from .evaluate import Exam, examine, player_of, sampling_of, tokens_sampled
from .progress import Progress
from .report import report
from .result import BASE, conclude, phase_name, points, seconds

PATIENCE = 3
"""Iterations in a row from which nothing could be learned, after which a run stops."""


class Alarm(Exception):
    """A trainer found that what it learns from can no longer be trusted."""


@dataclass
class Cast:
    """Everything a run works with, made once."""

    recipe: Recipe
    worlds: Worlds
    base: str
    agent: Agent
    policy: Policy
    judge: Judge
    learner: Learner
    progress: Progress
    phase: Phase
    """The one that the iteration in hand belongs to."""
    blind: Worlds | None = None
    """Worlds that never say whether an attempt was right; opened when first asked for."""
    seed: int = 0
    """Of the iteration in hand."""
    played: list[Judged] = field(default_factory=list[Judged])
    """Every episode of the iteration in hand."""
    asked: int = 0
    """Tokens that were sampled in it outside of episodes."""
    stopped: str = ""
    """Why the run ended before its last iteration."""

    def player(self, temperature: float | None = None) -> Player:
        """The policy in training; sampled as in training unless a temperature is given."""
        config = self.recipe.policy.config
        assert isinstance(config, PolicyConfig)
        heat = config.temperature if temperature is None else temperature
        return player_of(config, self.agent, self.policy, heat)

    @property
    def expert(self) -> Player:
        return ExpertPlayer(timeout_s=self.recipe.fleet.step_timeout_s)

    @property
    def exam(self) -> Exam:
        recipe, settings = self.recipe, self.recipe.evaluation
        return Exam(
            recipe.environment,
            recipe.agent,
            recipe.fleet,
            settings.split,
            settings.tasks,
            recipe.seed,
            settings.temperature,
            settings.turns,
            recipe.judge,
        )


async def run(recipe: Recipe, output: Path, console: Console) -> dict[str, Any]:
    """Run ``recipe``, or go on with it, in the folder ``output``; what ``result.json`` holds.

    Raises:
        SelfwrightError: it says what went wrong; what was committed stays, and the same command
            goes on from there.
    """
    progress = Progress(console)
    settings = recipe.environment.config.model_dump(mode="json")
    with Run.open(output, recipe.dump(), differences) as kept:
        if kept.has("result.json"):
            progress.say(f"{output} holds a finished run; this is its result")
            if not kept.has("report.html"):
                progress.say(f"report: {report(output)}")
            return read_json(kept.path("result.json"))
        async with await open_worlds(recipe.environment.use, settings, recipe.fleet) as worlds:
            base = await begun(recipe, worlds, kept, progress)
            policy: Policy = recipe.policy.make(base, recipe.seed)
            try:
                agent, judge = recipe.agent.make(), recipe.judge.make(worlds.sample)
                learner = recipe.learner.make(base, recipe.seed)
                first = recipe.phases[0]
                cast = Cast(recipe, worlds, base, agent, policy, judge, learner, progress, first)
                try:
                    await improve(cast, kept)
                finally:
                    if cast.blind is not None:
                        await cast.blind.close()
            finally:
                await policy.close()
        result = conclude(recipe, base, cast.stopped, kept)
        progress.say(f"report: {report(output)}")
        return result


async def begun(recipe: Recipe, worlds: Worlds, kept: Run, progress: Progress) -> str:
    """The base model. One made here is kept with the run, which then needs no other place."""
    config = recipe.policy.config
    assert isinstance(config, PolicyConfig)
    if not made_here(config):
        return await prepare(recipe, worlds, progress)
    if not kept.has(BASE):
        made = await prepare(recipe, worlds, progress)
        with kept.draft(BASE) as folder:
            shutil.copytree(made, folder, dirs_exist_ok=True)
    # Adapters note where their base is, and may be used from anywhere.
    return str(kept.path(BASE).resolve())


async def improve(cast: Cast, kept: Run) -> None:
    """Every iteration that is not committed yet, between evaluations on the same tasks."""
    recipe, judge = cast.recipe, cast.judge
    opened: dict[str, Policy] = {}
    try:
        means = context(cast, opened)
        await introduced(judge, means)
        # Before anything is played: what cannot be opened or is unfit is better known now.
        judges = [await judge_of(cast, means, phase) for phase in recipe.phases]
        trainers: list[Trainer] = [
            phase.trainer.make(replace(means, judge=mine))
            for phase, mine in zip(recipe.phases, judges, strict=True)
        ]
        await evaluated(cast, kept, "base")
        if kept.finished:
            last = kept.path(iteration_name(kept.finished - 1))
            trainer = trainers[phase_of(recipe, kept.finished - 1)]
            if isinstance(trainer, HasMemory):
                trainer.restore(last / "trainer")
            cast.learner.restore(last / "learner")
            await cast.policy.load(last / "checkpoint")
            cast.progress.say(f"resuming after iteration {kept.finished} of {recipe.iterations}")
        begin = 0
        for number, phase in enumerate(recipe.phases):
            cast.phase, cast.judge = phase, judges[number]
            try:
                await rounds(cast, means, trainers[number], kept, begin)
            except Alarm as alarm:
                cast.stopped = f"after iteration {kept.finished} of {recipe.iterations}: {alarm}"
                cast.progress.say(f"stopped {cast.stopped}")
                break
            begin += phase.iterations
            if begin < recipe.iterations and kept.finished == begin:
                cast.judge = judge
                await evaluated(cast, kept, phase_name(number))
        cast.judge = judge
        await evaluated(cast, kept, "final")
    finally:
        for other in opened.values():
            await other.close()


async def judge_of(cast: Cast, means: Context, phase: Phase) -> Judge:
    if phase.judge is cast.recipe.judge:
        return cast.judge
    judge: Judge = phase.judge.make(cast.worlds.sample)
    await introduced(judge, means)
    return judge


async def introduced(judge: Judge, means: Context) -> None:
    """Told where to find the policies it asks, which are opened."""
    if isinstance(judge, AsksPolicies):
        judge.ask_through(asked_by_judges(means))
        await judge.judge([])


def phase_of(recipe: Recipe, index: int) -> int:
    """The number of the phase that an iteration belongs to."""
    ends = accumulate(phase.iterations for phase in recipe.phases)
    return next(number for number, end in enumerate(ends) if index < end)


async def rounds(cast: Cast, means: Context, trainer: Trainer, kept: Run, begin: int) -> None:
    """The iterations of a phase that are left, each committed by itself; ``begin`` is its first.

    Raises:
        Alarm: the trainer's. The iteration it was raised in is kept, but nothing was learned in it.
    """
    recipe, policy = cast.recipe, cast.policy
    if isinstance(trainer, HasGuards) and trainer.alarm:
        raise Alarm(trainer.alarm)  # Raised before the run was killed.
    for index in range(max(begin, kept.finished), begin + cast.phase.iterations):
        spent = spent_share(kept, recipe)
        if spent >= 1:
            cast.progress.say(f"the budget is spent after iteration {index}")
            break
        done = max((index - begin) / cast.phase.iterations, spent)
        with kept.draft(iteration_name(index)) as folder:
            metrics = await iterate(cast, means, trainer, index, done)
            clock = Clock()
            cast.learner.export(folder / "checkpoint")
            cast.learner.save(folder / "learner")
            images = kept.folder / "images"
            write_trajectories(folder / TRAJECTORIES, cast.played, images)
            if isinstance(trainer, HasMemory):
                (folder / "trainer").mkdir()
                trainer.save(folder / "trainer", images)
            metrics["time/store_s"] = clock.lap()
            await policy.load(folder / "checkpoint")
            metrics |= await validated(cast, index)
            write_json(folder / "metrics.json", metrics)
        # The draft has its final name now; the weights are to be known by that.
        await policy.load(kept.path(iteration_name(index)) / "checkpoint")
        cast.progress.say(line(index, recipe.iterations, metrics))
        if isinstance(trainer, HasGuards) and trainer.alarm:
            raise Alarm(trainer.alarm)
        watch(kept, begin, index)


def spent_share(kept: Run, recipe: Recipe) -> float:
    """How much of the budget the committed iterations have cost."""
    rounds = [
        read_json(kept.path(iteration_name(k)) / "metrics.json") for k in range(kept.finished)
    ]
    costs = (sum(m[f"rollout/{key}"] for m in rounds) for key in ("environment_steps", "tokens"))
    return recipe.budget.share(*costs)


async def iterate(
    cast: Cast, means: Context, trainer: Trainer, index: int, progress: float = 0.0
) -> Metrics:
    """Play, judge, learn once. The episodes are left in ``cast.played``."""
    recipe, plan = cast.recipe, trainer.plan
    cast.played, cast.asked = [], 0
    cast.seed = derive(recipe.seed, "iteration", index)
    clock = Clock()
    given: list[Judged] = []
    if plan.tasks:
        tasks = draw(cast.worlds.tasks("train"), plan.tasks, derive(cast.seed, "tasks"))
        begin = starts(tasks, plan.attempts, cast.seed, plan.turns)
        what = f"iteration {index + 1}: playing"
        if plan.player == "policy":
            given = await attempt(cast, cast.player(), begin, what)
        else:
            given = await (await means.play_as(plan.player))(begin)
    batches = await trainer.batches(given)
    metrics = {"time/rollout_s": clock.lap()} | summary(cast.played, cast.asked)
    if isinstance(trainer, HasFindings):
        metrics |= trainer.findings
    if isinstance(trainer, HasGuards) and trainer.alarm:
        batches = []
    loop = asyncio.get_running_loop()
    learned: list[Metrics] = []
    with cast.progress.stage(f"iteration {index + 1}: learning"):
        for batch in batches:
            if batch.examples:
                # In a thread, so that deadlines and signals are served while it computes.
                update = loop.run_in_executor(None, cast.learner.update, batch, progress)
                learned.append(await update)
    return metrics | together(learned) | {"time/learn_s": clock.lap()}


COUNTED = ("train/examples", "train/rows", "train/updates", "train/tokens", "train/prefix_breaks")
"""What adds up over an iteration's batches; of other metrics the mean over updates is told."""


def together(learned: Sequence[Metrics]) -> Metrics:
    """The metrics of an iteration's batches as those of one."""
    total: Metrics = {key: 0.0 for key in ("train/examples", "train/tokens")}
    updates = sum(one.get("train/updates", 1.0) for one in learned)
    for one in learned:
        share = one.get("train/updates", 1.0) / updates if updates else 1 / len(learned)
        for key, value in one.items():
            total[key] = total.get(key, 0.0) + (value if key in COUNTED else share * value)
    return total | {"train/total_tokens": total["train/tokens"]}


def context(cast: Cast, opened: dict[str, Policy]) -> Context:
    """What the trainer may use; other policies are opened when first asked for."""
    config = cast.recipe.policy.config
    assert isinstance(config, PolicyConfig)

    async def play(begin: Sequence[Start]) -> list[Judged]:
        return await attempt(cast, cast.player(), begin, "playing on")

    async def play_blind(begin: Sequence[Start]) -> list[Judged]:
        if cast.blind is None:
            world = cast.recipe.environment
            settings = world.config.model_dump(mode="json")
            cast.blind = await open_worlds(
                world.use, settings, cast.recipe.fleet, without_oracle=True
            )
        return await attempt(cast, cast.player(), begin, "playing on", cast.blind)

    async def open_policy(name: str) -> Policy:
        if name not in opened:
            opened[name] = other_policy(cast, name)
        return opened[name]

    def count(said: Completion) -> None:
        cast.asked += len(said.token_ids)

    async def open_patient(name: str) -> Policy:
        return patient(await open_policy(name), config.timeout_s, count)

    async def play_as(name: str) -> Attempt:
        player: Player = cast.expert
        if name != "expert":
            named = cast.recipe.policies.get(name)
            its = named.config if named else config
            assert isinstance(its, PolicyConfig)
            player = player_of(its, cast.agent, await open_policy(name), its.temperature)

        async def teach(begin: Sequence[Start]) -> list[Judged]:
            return await attempt(cast, player, begin, f"{name} playing on")

        return teach

    sampling = sampling_of(config, config.temperature)
    return Context(
        cast.agent,
        cast.judge,
        patient(cast.policy, config.timeout_s, count),
        play,
        play_blind,
        play_as,
        open_patient,
        namer(cast.worlds),
        sampling,
        cast.base,
        cast.recipe.seed,
    )


def other_policy(cast: Cast, name: str) -> Policy:
    """One of the recipe's ``policies``, the base, or a model as the policy's engine opens it."""
    recipe = cast.recipe
    section = recipe.policies.get(name, recipe.policy)
    model = cast.base if name == BASE else name
    if name in recipe.policies:
        assert isinstance(section.config, PolicyConfig)
        model = section.config.model
    return section.make(model, recipe.seed)


SCANNED = 100_000
"""Training tasks that are looked through for a name, in worlds that cannot look it up."""


def namer(worlds: Worlds) -> Callable[[str], Task]:
    """Finds training tasks by their ids; raises ValueError where there is none."""
    found: dict[str, Task] = {}

    def named(id: str) -> Task:
        if isinstance(worlds.sample, HasNamedTasks):
            return worlds.sample.named(id)
        if not found:
            tasks = worlds.tasks("train")
            every = (tasks[index] for index in range(min(len(tasks), SCANNED)))
            found.update({task.id: task for task in every})
        if id not in found:
            raise ValueError(f"there is no training task {id!r}")
        return found[id]

    return named


def asked_by_judges(means: Context) -> Callable[[str], Awaitable[Policy]]:
    async def open_for_judge(name: str) -> Policy:
        return means.policy if name == "policy" else await means.open(name)

    return open_for_judge


async def attempt(
    cast: Cast, player: Player, begin: Sequence[Start], what: str, worlds: Worlds | None = None
) -> list[Judged]:
    """Play and judge; the episodes join the iteration's."""
    with cast.progress.stage(what, len(begin)) as tell:
        played = await rollouts(player, worlds or cast.worlds, begin, cast.seed, tell)
    config = cast.phase.judge.config
    assert isinstance(config, JudgeConfig)
    given = await judged(cast.judge, played, config)
    cast.played += given
    return given


def summary(played: Sequence[Judged], asked: int = 0) -> Metrics:
    """What was played, in numbers; nothing undefined is written down as a number.

    ``asked``: tokens that were sampled outside of episodes.
    """
    trajectories = [j.trajectory for j in played]
    scores = [j.verdict.score for j in played if j.verdict.score is not None]
    own = [step for t in trajectories for step in t.steps[t.replayed :]]
    metrics: Metrics = {
        "rollout/episodes": float(len(played)),
        "rollout/environment_steps": float(sum(len(t.steps) for t in trajectories)),
        "rollout/tokens": float(tokens_sampled(trajectories) + asked),
        "rollout/failed": float(sum(t.stop == Stop.FAILED for t in trajectories)),
        "judge/undecided": float(len(played) - len(scores)),
        "judge/broken": float(sum(j.verdict.judge == BROKEN for j in played)),
    }
    metrics |= {f"failures/{k}": float(v) for k, v in failures_by_name(trajectories).items()}
    if played:
        metrics["rollout/success"] = sum(t.success for t in trajectories) / len(played)
        metrics["rollout/reward"] = sum(t.reward for t in trajectories) / len(played)
    if scores:
        metrics["judge/score"] = sum(scores) / len(scores)
    if own:
        cut = sum(step.action.completion.finish == "length" for step in own)
        metrics["rollout/cut_share"] = cut / len(own)
    return metrics


async def validated(cast: Cast, index: int) -> Metrics:
    """A point of the learning curve, on validation tasks that nothing is trained on."""
    settings = cast.recipe.evaluation
    if not settings.every or (index + 1) % settings.every:
        return {}
    clock = Clock()
    seed = derive(cast.recipe.seed, "validation")
    tasks = draw(cast.worlds.tasks("validation"), settings.validation_tasks, seed)
    player = cast.player(settings.temperature)
    played = await rollouts(player, cast.worlds, starts(tasks, 1, seed), seed)
    return {
        "validation/success": sum(t.success for t in played) / len(played),
        "validation/tasks": float(len(played)),
        "validation/failed": float(sum(t.stop == Stop.FAILED for t in played)),
        "validation/environment_steps": float(sum(len(t.steps) for t in played)),
        "validation/tokens": float(tokens_sampled(played)),
        "time/validation_s": clock.lap(),
    }


async def evaluated(cast: Cast, kept: Run, name: str) -> None:
    """``evaluations/NAME``, unless it is there already."""
    if kept.has(f"evaluations/{name}"):
        return
    player = cast.player(cast.exam.temperature)
    exam, judge = cast.exam, cast.judge
    result, episodes = await examine(exam, player, judge, cast.worlds, cast.progress, name)
    with kept.draft(f"evaluations/{name}") as folder:
        files.write(folder, result)
        write_trajectories(folder / TRAJECTORIES, episodes, kept.folder / "images")
    low, high = result.interval
    cast.progress.say(
        f"{name}: {result.successes} of {result.tasks} {result.split} tasks solved, "
        f"{result.success_rate:.1%} [{low:.1%}, {high:.1%}]"
    )


def watch(kept: Run, begin: int, index: int) -> None:
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


def line(index: int, iterations: int, metrics: Metrics) -> str:
    """One iteration for people."""
    parts = [f"iteration {index + 1}/{iterations}"]
    if points(metrics):
        parts.append(f"validation {metrics['validation/success']:.1%}")
    if "judge/score" in metrics:
        parts.append(f"score {metrics['judge/score']:.3f}")
    if "train/loss" in metrics:
        parts.append(f"loss {metrics['train/loss']:.3f}")
    parts.append(f"{metrics.get('train/examples', 0):.0f} examples")
    if metrics["rollout/failed"]:
        parts.append(f"{metrics['rollout/failed']:.0f} failed")
    return ", ".join([*parts, f"{sum(seconds(metrics).values()):.1f} s"])


class Clock:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def lap(self) -> float:
        now = time.monotonic()
        gone, self._since = now - self._since, now
        return gone
