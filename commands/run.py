"""The whole loop, top to bottom: play, judge, learn, again; then prove it."""

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ..core import evaluation as files
from ..core.asking import patient
from ..core.config import JudgeConfig, PolicyConfig
from ..core.draw import draw, starts
from ..core.errors import LearnerError
from ..core.files import hard_link, read_json, write_json
from ..core.judging import BROKEN, judged
from ..core.protocols import (
    Agent,
    AsksPolicies,
    Attempt,
    Context,
    HasGuards,
    HasMemory,
    Judge,
    Learner,
    Policy,
    Trainer,
)
from ..core.recipe import Recipe, differences
from ..core.rollout import ExpertPlayer, Player, failures_by_name, rollouts
from ..core.run import Run, iteration_name
from ..core.seeds import derive
from ..core.statistics import compare_outcomes, wilson
from ..core.store import TRAJECTORIES, write_trajectories
from ..core.types import Judged, Metrics, Start, Stop
from ..core.worlds import Worlds, open_worlds
from .base import STORY, made_here, prepare
from .evaluate import Exam, examine, player_of, sampling_of, tokens_sampled, write_card
from .progress import Progress
from .report import report

BASE = "base"
"""The folder, in the run's, of a base model that was made here."""
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
    blind: Worlds | None = None
    """Worlds that never say whether an attempt was right; opened when first asked for."""
    seed: int = 0
    """Of the iteration in hand."""
    played: list[Judged] = field(default_factory=list[Judged])
    """Every episode of the iteration in hand."""
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
                cast = Cast(recipe, worlds, base, agent, policy, judge, learner, progress)
                try:
                    await improve(cast, kept)
                finally:
                    if cast.blind is not None:
                        await cast.blind.close()
            finally:
                await policy.close()
        result = conclude(cast, kept)
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
    """Every iteration that is not committed yet, between two evaluations on the same tasks."""
    recipe = cast.recipe
    opened: dict[str, Policy] = {}
    try:
        means = context(cast, opened)
        if isinstance(cast.judge, AsksPolicies):
            cast.judge.ask_through(asked_by_judges(means))
            # What cannot be opened is better known before anything is played.
            await cast.judge.judge([])
        trainer: Trainer = recipe.trainer.make(means)
        await evaluated(cast, kept, "base")
        if kept.finished:
            last = kept.path(iteration_name(kept.finished - 1))
            if isinstance(trainer, HasMemory):
                trainer.restore(last / "trainer")
            cast.learner.restore(last / "learner")
            await cast.policy.load(last / "checkpoint")
            cast.progress.say(f"resuming after iteration {kept.finished} of {recipe.iterations}")
        try:
            await rounds(cast, means, trainer, kept)
        except Alarm as alarm:
            if not kept.finished:
                raise LearnerError(f"nothing was learned: {alarm}") from None
            cast.stopped = f"after iteration {kept.finished} of {recipe.iterations}: {alarm}"
            cast.progress.say(f"stopped {cast.stopped}")
        await evaluated(cast, kept, "final")
    finally:
        for other in opened.values():
            await other.close()


async def rounds(cast: Cast, means: Context, trainer: Trainer, kept: Run) -> None:
    """The iterations that are left, each committed by itself. Raises: Alarm: the trainer's."""
    recipe, policy = cast.recipe, cast.policy
    for index in range(kept.finished, recipe.iterations):
        spent = spent_share(kept, recipe)
        if spent >= 1:
            cast.progress.say(f"the budget is spent after iteration {index}")
            break
        with kept.draft(iteration_name(index)) as folder:
            metrics = await iterate(cast, means, trainer, index, spent)
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
        watch(kept, index)


def spent_share(kept: Run, recipe: Recipe) -> float:
    """How much of the budget the committed iterations have cost."""
    rounds = [
        read_json(kept.path(iteration_name(k)) / "metrics.json") for k in range(kept.finished)
    ]
    costs = (sum(m[f"rollout/{key}"] for m in rounds) for key in ("environment_steps", "tokens"))
    return recipe.budget.share(*costs)


async def iterate(
    cast: Cast, means: Context, trainer: Trainer, index: int, spent: float = 0.0
) -> Metrics:
    """Play, judge, learn once. The episodes are left in ``cast.played``."""
    recipe, plan = cast.recipe, trainer.plan
    cast.played = []
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
    metrics = {"time/rollout_s": clock.lap()} | summary(cast.played)
    if isinstance(trainer, HasGuards):
        metrics |= trainer.findings
        if trainer.alarm:
            raise Alarm(trainer.alarm)
    loop = asyncio.get_running_loop()
    progress = max(index / recipe.iterations, spent)
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
            model = cast.base if name == BASE else name
            opened[name] = cast.recipe.policy.make(model, cast.recipe.seed)
        return opened[name]

    async def open_patient(name: str) -> Policy:
        return patient(await open_policy(name), config.timeout_s)

    async def play_as(name: str) -> Attempt:
        player: Player = cast.expert
        if name != "expert":
            player = player_of(config, cast.agent, await open_policy(name), config.temperature)

        async def teach(begin: Sequence[Start]) -> list[Judged]:
            return await attempt(cast, player, begin, f"{name} playing on")

        return teach

    sampling = sampling_of(config, config.temperature)
    return Context(
        cast.agent,
        cast.judge,
        patient(cast.policy, config.timeout_s),
        play,
        play_blind,
        play_as,
        open_patient,
        sampling,
        cast.base,
        cast.recipe.seed,
    )


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
    config = cast.recipe.judge.config
    assert isinstance(config, JudgeConfig)
    given = await judged(cast.judge, played, config)
    cast.played += given
    return given


def summary(played: Sequence[Judged]) -> Metrics:
    """What was played, in numbers; nothing undefined is written down as a number."""
    trajectories = [j.trajectory for j in played]
    scores = [j.verdict.score for j in played if j.verdict.score is not None]
    own = [step for t in trajectories for step in t.steps[t.replayed :]]
    metrics: Metrics = {
        "rollout/episodes": float(len(played)),
        "rollout/environment_steps": float(sum(len(t.steps) for t in trajectories)),
        "rollout/tokens": float(tokens_sampled(trajectories)),
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


def watch(kept: Run, index: int) -> None:
    """Raises: LearnerError: the last iterations had nothing to learn from."""
    recent = [
        read_json(kept.path(iteration_name(k)) / "metrics.json")
        for k in range(max(0, index + 1 - PATIENCE), index + 1)
    ]
    if len(recent) == PATIENCE and not any(m.get("train/examples") for m in recent):
        score = recent[-1].get("judge/score", "undefined")
        raise LearnerError(
            f"nothing is being learned: the trainer found no example in {PATIENCE} iterations "
            f"(mean score {score}, {recent[-1]['judge/undecided']:.0f} undecided, "
            f"{recent[-1]['rollout/failed']:.0f} failed); warm the policy up, make the tasks "
            "easier, or loosen the trainer's filter"
        )


def conclude(cast: Cast, kept: Run) -> dict[str, Any]:
    """The checkpoint's folder and ``result.json``."""
    recipe = cast.recipe
    if not kept.has("checkpoint"):
        with kept.draft("checkpoint") as folder:
            last = kept.path(iteration_name(kept.finished - 1)) / "checkpoint"
            shutil.copytree(last, folder, dirs_exist_ok=True)
            inside = Path(cast.base).is_dir()
            if inside:
                # What is kept with the run is never rewritten; of somebody else's nobody knows.
                put = hard_link if kept.has(BASE) else shutil.copy2
                shutil.copytree(cast.base, folder / "base", copy_function=put)
            card: dict[str, Any] = recipe.dump()
            card |= {"base": "base" if inside else cast.base, "base_inside": inside}
            write_card(folder, card)
    base, final = (files.read(kept.path(f"evaluations/{name}")) for name in ("base", "final"))
    rounds = [
        read_json(kept.path(iteration_name(k)) / "metrics.json") for k in range(kept.finished)
    ]

    def total(key: str) -> int:
        return int(sum(metrics.get(key, 0.0) for metrics in rounds))

    warm = read_json(kept.path(BASE) / STORY) if kept.has(BASE) else None
    training = sum(sum(seconds(metrics).values()) for metrics in rounds)
    validation = sum(seconds(metrics).get("validation", 0.0) for metrics in rounds)
    compared = compare_outcomes(base.outcomes, final.outcomes)
    result: dict[str, Any] = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "base": brief(base),
        "final": brief(final),
        "comparison": {
            "difference": compared.difference,
            "interval": list(compared.interval),
            "p_value": compared.p_value,
            "verdict": compared.verdict,
            "test": compared.test,
            "only_base": compared.only_a,
            "only_final": compared.only_b,
        },
        "stopped": cast.stopped or None,
        "introspection": None,
        "curve": [point(k, metrics) for k, metrics in enumerate(rounds) if points(metrics)],
        "wall_s": (warm["wall_s"] if warm else 0.0) + training + base.wall_s + final.wall_s,
        "environment_steps": total("rollout/environment_steps"),
        "tokens_sampled": total("rollout/tokens"),
        "tokens_trained": total("train/total_tokens"),
        "warm_start": warm,
        "evaluation": {
            "wall_s": base.wall_s + final.wall_s + validation,
            "environment_steps": base.environment_steps
            + final.environment_steps
            + total("validation/environment_steps"),
            "tokens_sampled": base.tokens_sampled
            + final.tokens_sampled
            + total("validation/tokens"),
        },
        "costs": [costs(k, metrics) for k, metrics in enumerate(rounds)],
    }
    if base.introspection and final.introspection:
        tables = (read_json(kept.path(f"evaluations/{n}/{files.FILE}")) for n in ("base", "final"))
        result["introspection"] = dict(
            zip(("base", "final"), (t["introspection"] for t in tables), strict=True)
        )
    write_json(kept.path("result.json"), result)
    return result


def brief(evaluation: files.EvaluationResult) -> dict[str, Any]:
    return {
        "tasks": evaluation.tasks,
        "successes": evaluation.successes,
        "success_rate": evaluation.success_rate,
        "interval": list(evaluation.interval),
        "failed": evaluation.failed,
        "failures": evaluation.failures,
    }


def seconds(metrics: Metrics) -> dict[str, float]:
    """Where an iteration's time went, by phase."""
    return {
        key.removeprefix("time/").removesuffix("_s"): value
        for key, value in metrics.items()
        if key.startswith("time/")
    }


def costs(index: int, metrics: Metrics) -> dict[str, Any]:
    """What one iteration's training cost, its evaluation left out."""
    prefix = "failures/"
    return {
        "iteration": index + 1,
        "episodes": int(metrics["rollout/episodes"]),
        "environment_steps": int(metrics["rollout/environment_steps"]),
        "tokens_sampled": int(metrics["rollout/tokens"]),
        "tokens_trained": int(metrics.get("train/total_tokens", 0)),
        "wall_s": sum(v for k, v in seconds(metrics).items() if k != "validation"),
        "failures": {
            key.removeprefix(prefix): int(value)
            for key, value in metrics.items()
            if key.startswith(prefix)
        },
    }


def points(metrics: Metrics) -> bool:
    return "validation/success" in metrics


def point(index: int, metrics: Metrics) -> dict[str, Any]:
    rate, tasks = metrics["validation/success"], int(metrics["validation/tasks"])
    return {
        "iteration": index + 1,
        "success_rate": rate,
        "interval": list(wilson(round(rate * tasks), tasks)),
        "tasks": tasks,
    }


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
