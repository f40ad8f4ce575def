"""Plays a checkpoint on held-out tasks and counts: the evidence every comparison rests on."""

import hashlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core import evaluation as files
from ..core.config import Config, Evaluation, Fleet, JudgeConfig, PolicyConfig
from ..core.errors import JudgeError, RecipeError, StoreError
from ..core.evaluation import EvaluationResult, TaskResult, summarise
from ..core.files import check_writable, read_json
from ..core.hosting.pool import Worlds, open_worlds
from ..core.hosting.spec import has_attempts
from ..core.images import FOLDER as IMAGES
from ..core.images import STORE
from ..core.models.gguf import is_gguf
from ..core.models.origin import ADAPTER, found_base, parts_of
from ..core.play.asking import with_deadline
from ..core.play.briefing import briefed
from ..core.play.draw import draw, starts
from ..core.play.judging import judged
from ..core.play.players import ExpertPlayer, Player, PolicyPlayer, RandomPlayer
from ..core.play.rollout import rollouts
from ..core.protocols import AsksPolicies, Judge, Policy
from ..core.recipe import Section, section
from ..core.seeds import derive, identify
from ..core.statistics import Agreement, Introspection, agreement, introspection_table
from ..core.store import JudgeIdentity, judge_identity, write_trajectories
from ..core.types import Judged, Sampling, Step, Stop, Task, Trajectory
from ..judges.model import rubric_file
from .events import Listener, ignore
from .progress import Progress

AGENT = "agent.json"
"""In a run's folder: its agent as it was told of its world, where it wants that."""
CARD = "selfwright.json"
"""In a checkpoint's folder: the world, agent and sampling it was trained with."""


@dataclass(frozen=True)
class EvalSpec:
    """What a checkpoint is put to."""

    environment: Section
    agent: Section
    fleet: Fleet
    split: str
    tasks: int
    seed: int
    temperature: float
    turns: int
    """Of the introspection table; 0: none."""
    judge: Section


async def drawn(
    worlds: Worlds, split: str, count: int, seed: int, progress: Progress
) -> list[Task]:
    """``draw``; where there are fewer tasks than were asked for, it is said."""
    tasks = await draw(worlds.tasks(split), count, seed)
    if len(tasks) < count:
        progress.note(f"{count} {split} tasks were asked for, and the world has {len(tasks)}")
    return tasks


async def exam_tasks(
    worlds: Worlds, split: str, count: int, seed: int, progress: Progress
) -> list[Task]:
    return await drawn(worlds, split, count, derive(seed, "evaluation", split), progress)


async def evaluate(
    spec: EvalSpec,
    player: Player,
    judge: Judge,
    worlds: Worlds,
    progress: Progress,
    name: str,
    origin: str,
) -> tuple[EvaluationResult, list[Judged]]:
    """Play and judge each task once; for worlds of attempts, fill the introspection table too.

    ``name`` is for people; ``origin`` as in ``rollouts``.
    """
    began = time.monotonic()
    tasks = await exam_tasks(worlds, spec.split, spec.tasks, spec.seed, progress)
    seed = derive(spec.seed, "evaluation")
    with progress.stage(f"evaluating {name}", len(tasks)) as stage:
        begin, done = starts(tasks, 1, spec.seed), stage.advance
        played = await rollouts(
            player, worlds, begin, seed, done, origin=origin, stepped=stage.stepped
        )
    config = spec.judge.config
    assert isinstance(config, JudgeConfig)
    episodes = await judged(judge, played, config)
    table, more = None, list[Trajectory]()
    if spec.turns and has_attempts(worlds.abilities):
        with progress.stage(f"introspection of {name}") as stage:
            table, more = await introspect(spec, player, worlds, tasks, stage.stepped)
    results = tuple(task_result(episode) for episode in episodes)
    result = EvaluationResult(
        checkpoint=player.name,
        environment=spec.environment.dump(),
        agent=spec.agent.dump(),
        split=spec.split,
        seed=spec.seed,
        temperature=spec.temperature,
        undecided=sum(r.score is None and not r.failed for r in results),
        environment_steps=sum(t.executed for t in (*played, *more)),
        tokens_sampled=tokens_sampled((*played, *more)),
        wall_s=time.monotonic() - began,
        introspection=table,
        judge=spec.judge.use,
        agreement=None if spec.judge.use == "reward" else agreement_of(results),
        results=results,
        **summarise(results),
    )
    return result, episodes


def task_result(episode: Judged) -> TaskResult:
    t = episode.trajectory
    failed, score = t.stop == Stop.FAILED, episode.verdict.score
    invalid = sum(bool(step.action.invalid) for step in t.steps)
    return TaskResult(t.task.id, t.success, failed, t.reward, len(t.steps), t.error, score, invalid)


def agreement_of(results: Sequence[TaskResult]) -> Agreement:
    decided = [(r.score >= 0.5, r.success) for r in results if r.score is not None]
    return agreement(decided)


def tokens_sampled(trajectories: Sequence[Trajectory]) -> int:
    """Tokens of the turns that were not replayed."""
    return sum(
        len(step.action.completion.token_ids)
        for t in trajectories
        for step in t.steps[t.replayed :]
    )


async def introspect(
    spec: EvalSpec,
    player: Player,
    worlds: Worlds,
    tasks: Sequence[Task],
    stepped: Callable[[Step], None] = lambda _: None,
) -> tuple[Introspection, list[Trajectory]]:
    """RISE's table, sampled at temperature 1: votes among greedy samples would all agree.

    With the episodes that were played for it.

    Raises:
        TooManyFailures: too many could not be played.
    """
    turns = spec.turns
    if isinstance(player, PolicyPlayer):
        player = replace(player, sampling=replace(player.sampling, temperature=1.0))
    longer = [replace(task, max_steps=turns) for task in tasks]
    seed = derive(spec.seed, "introspection")
    single, several = starts(longer, 1, spec.seed), starts(longer, turns, spec.seed, 1)
    parallel = await rollouts(player, worlds, several, seed, stepped=stepped)
    oracle = await rollouts(player, worlds, single, derive(seed, "oracle"), stepped=stepped)
    settings = spec.environment.config.model_dump(mode="json")
    async with await open_worlds(
        spec.environment.use, settings, spec.fleet, without_oracle=True
    ) as silent:
        sequential = await rollouts(
            player, silent, single, derive(seed, "sequential"), stepped=stepped
        )

    def samples(trajectory: Trajectory) -> list[tuple[str | None, bool]]:
        return [(step.answer or None, step.reward >= 1) for step in trajectory.steps]

    table = introspection_table(
        [
            [sample for t in parallel[k : k + turns] for sample in samples(t)]
            for k in range(0, len(parallel), turns)
        ],
        [samples(t) for t in sequential],
        [[right for _, right in samples(t)] for t in oracle],
        turns,
    )
    return table, [*parallel, *oracle, *sequential]


def card_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's card keeps of its run's recipe, as ``Recipe.dump`` has it."""
    # The cluster was the run's: who plays the checkpoint elsewhere has none.
    return recipe | {"environment": recipe["environment"] | {"on": "local"}}


def write_card(folder: Path, card: dict[str, Any]) -> None:
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


async def evaluate_checkpoint(
    checkpoint: str,
    environment: str | None,
    overrides: Sequence[str],
    split: str,
    tasks: int | None,
    seed: int,
    temperature: float | None,
    output: Path | None,
    listener: Listener = ignore,
    judged_by: str | None = None,
) -> dict[str, Any]:
    """``selfwright evaluate``: the numbers of one checkpoint, as written to its folder.

    Raises:
        RecipeError: the world is not named, or an option is wrong.
        StoreError: there is no such checkpoint, or the output cannot be written.
    """
    progress = Progress(listener)
    card = read_card(checkpoint)
    spec, policy = settle(
        card, checkpoint, environment, overrides, split, tasks, seed, temperature, judged_by
    )
    folder = output or default_output(checkpoint, spec, overrides)
    check_writable(folder, "use another --output")
    settings = spec.environment.config.model_dump(mode="json")
    async with await open_worlds(spec.environment.use, settings, spec.fleet) as worlds:
        spec = replace(spec, agent=await briefed(spec.agent, worlds, seed))
        player = await player_from(checkpoint, card, policy, spec, worlds)
        judge: Judge = spec.judge.make()
        opened: dict[str, Policy] = {}
        try:
            if isinstance(judge, AsksPolicies):
                judge.ask_through(opener(player, policy, card, opened, spec.seed))
                # What cannot be opened is better known before anything is played.
                await judge.judge([])
            origin = identify(asked(checkpoint, spec, overrides))
            with STORE.kept_in(folder / IMAGES):
                result, episodes = await evaluate(
                    spec, player, judge, worlds, progress, checkpoint, origin
                )
        finally:
            for other in opened.values():
                await other.close()
            if isinstance(player, PolicyPlayer):
                await player.policy.close()
    result = replace(result, checkpoint=checkpoint)
    write_trajectories(folder, episodes, folder / IMAGES, judge_of(spec.judge))
    path = files.write(folder, result)
    summary: dict[str, Any] = read_json(path)
    summary.pop("results")
    scores = [one.score for one in result.results if one.score is not None]
    mean = sum(scores) / len(scores) if scores else None
    return summary | {"folder": str(folder), "mean_score": mean, "tasks_asked": spec.tasks}


def read_card(checkpoint: str) -> dict[str, Any] | None:
    """The card of a run, of its checkpoint or of one of its iterations; None for anything else."""
    for folder in (Path(checkpoint), Path(checkpoint) / "checkpoint"):
        if (folder / CARD).is_file():
            return read_json(folder / CARD) | {"folder": str(folder)}
        if card := _iteration_card(folder.resolve()):
            return card
    return None


def _iteration_card(folder: Path) -> dict[str, Any] | None:
    """What the card of an iteration's checkpoint would say: the recipe is the run's."""
    if folder.name != "checkpoint" or folder.parents[1].name != "iterations":
        return None
    recipe = folder.parents[2] / "recipe.json"
    if not recipe.is_file():
        return None
    if not any((folder / name).is_file() for name in (ADAPTER, "config.json")):
        return None
    base = found_base(folder) or str(folder)
    origin: dict[str, Any] = {"base": base, "base_inside": False, "folder": str(folder)}
    agent = folder.parents[2] / AGENT
    if agent.is_file():
        origin["agent"] = read_json(agent)
    return card_of(read_json(recipe)) | origin


def settle(
    card: dict[str, Any] | None,
    checkpoint: str,
    environment: str | None,
    overrides: Sequence[str],
    split: str,
    tasks: int | None,
    seed: int,
    heat: float | None,
    judged_by: str | None = None,
    engine: str | None = None,
) -> tuple[EvalSpec, Section | None]:
    """What is played, from the checkpoint's card and the command line, and with which policy.

    ``engine``: the policy's plug-in, if it is to be another than in training.
    """
    card = card or {}
    settings = Evaluation.model_validate(card.get("evaluation", {}))
    mine = by_section(checkpoint, overrides, ("environment", "agent", "policy", "judge"))
    world: dict[str, Any] = card.get("environment", {})
    use = environment or world.get("use")
    if use is None:
        # Whoever mistypes the folder of a run is not served by hearing of worlds alone.
        known = checkpoint in ("expert", "random") or is_gguf(checkpoint)
        known = known or Path(checkpoint).exists()
        missing = "" if known else f"there is no folder {checkpoint}; if it is a model's hub id, "
        raise RecipeError(
            f"{missing}say in which world {checkpoint} is to play: --environment NAME"
        )
    kept = {k: v for k, v in world.items() if k != "use"} if use == world.get("use") else {}
    played, fleet = section("environment", use, mine["environment"], kept)
    agent = agent_of(card, mine["agent"])
    judge_settings: dict[str, Any] = card.get("judge", {"use": "reward"})
    if judged_by and judged_by != judge_settings["use"]:
        judge_settings = {"use": judged_by}
    judge, _ = section("judge", judge_settings["use"], mine["judge"], _rest(judge_settings))
    count = settings.tasks if tasks is None else tasks
    temperature = settings.temperature if heat is None else heat
    spec = EvalSpec(played, agent, fleet, split, count, seed, temperature, settings.turns, judge)
    if checkpoint in ("expert", "random"):
        return spec, None
    return spec, engine_of(card, checkpoint, mine["policy"], engine)


def by_section(
    checkpoint: str, overrides: Sequence[str], keys: Sequence[str], command: str = "evaluate"
) -> dict[str, list[str]]:
    """The overrides of each of ``keys``.

    Raises:
        RecipeError: one is of none of them, or is said in another way on this command line.
    """
    mine: dict[str, list[str]] = {key: [] for key in keys}
    for override in overrides:
        path = override.partition("=")[0]
        key = path.split(".")[0]
        if key not in mine:
            raise RecipeError(
                f"-o {override}: {command} knows the keys {', '.join(mine)}; {key!r} is none of "
                "them"
            )
        if path == "policy.temperature":
            raise RecipeError(f"-o {override}: that is for training; {command} has --temperature")
        if path == "policy.model":
            raise RecipeError(f"-o {override}: the model is the first argument, {checkpoint!r}")
        mine[key].append(override)
    return mine


def agent_of(card: Mapping[str, Any], overrides: Sequence[str]) -> Section:
    """How the checkpoint reads and acts: as it was trained, or by another agent if one is named."""
    settings: dict[str, Any] = card.get("agent", {"use": "chat"})
    named = [one for one in overrides if one.startswith("agent.use=")]
    if named:
        settings = {"use": named[-1].removeprefix("agent.use=")}
        overrides = [one for one in overrides if one not in named]
    return section("agent", settings["use"], overrides, _rest(settings))[0]


def engine_of(
    card: Mapping[str, Any], checkpoint: str, overrides: Sequence[str], engine: str | None = None
) -> Section:
    """What the checkpoint is run by; of another ``engine``, what all engines know is kept."""
    settings: dict[str, Any] = card.get("policy", {"use": "transformers", "model": checkpoint})
    if engine is not None and engine != settings["use"]:
        settings = {key: settings[key] for key in PolicyConfig.model_fields if key in settings}
        settings["use"] = engine
    return section("policy", settings["use"], overrides, _rest(settings))[0]


def _rest(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "use"}


async def player_from(
    checkpoint: str,
    card: dict[str, Any] | None,
    policy: Section | None,
    spec: EvalSpec,
    worlds: Worlds,
) -> Player:
    """Who plays: the expert, chance, or the checkpoint's policy with its weights loaded."""
    if policy is None:
        limit = spec.fleet.step_timeout_s
        if checkpoint == "random":
            return RandomPlayer(spec.agent.make(), limit)
        if "expert" not in worlds.abilities:
            raise RecipeError(f"{spec.environment.use} has no expert to be evaluated")
        return ExpertPlayer(spec.agent.make(), timeout_s=limit)
    assert isinstance(policy.config, PolicyConfig)
    base, adapter = weights_of(checkpoint, card)
    model = policy.make(base, spec.seed)
    await model.load(adapter)
    return player_of(policy.config, spec.agent.make(), model, spec.temperature)


def weights_of(checkpoint: str, card: Mapping[str, Any] | None) -> tuple[str, Path | None]:
    """The base model of a checkpoint, and what is loaded on it; None for the base itself.

    Raises:
        StoreError: there is no such checkpoint.
    """
    if card is not None:
        return base_of(card), Path(card["folder"])
    if not Path(checkpoint).is_dir() and re.match(r"[./~]", checkpoint):
        raise StoreError(f"there is no checkpoint at {checkpoint}")
    return parts_of(checkpoint)


def base_of(card: Mapping[str, Any]) -> str:
    """The model that a run's checkpoint began with."""
    folder = Path(card["folder"])
    noted = str(folder / card["base"]) if card["base_inside"] else card["base"]
    return found_base(folder) or noted


def opener(
    player: Player,
    policy: Section | None,
    card: Mapping[str, Any] | None,
    opened: dict[str, Policy],
    seed: int,
) -> Callable[[str], Awaitable[Policy]]:
    """Finds models for a judge: the one under test, its base, or any other; kept in ``opened``."""
    engine = policy or section("policy", "transformers", (), {"model": "base"})[0]
    assert isinstance(engine.config, PolicyConfig)
    timeout_s = engine.config.timeout_s

    others: Mapping[str, Any] = (card or {}).get("policies", {})

    async def open(name: str) -> Policy:
        if name == "policy" and isinstance(player, PolicyPlayer):
            return with_deadline(player.policy, timeout_s)
        if name in others:
            named, _ = section("policy", others[name]["use"], (), _rest(others[name]))
            assert isinstance(named.config, PolicyConfig)
            if name not in opened:
                opened[name] = named.make(named.config.model, seed)
            return with_deadline(opened[name], named.config.timeout_s)
        if name in ("policy", "base") and card is None:
            raise JudgeError(
                f"{player.name} has no {name} to ask; say which model judges: -o judge.model=..."
            )
        if name not in opened:
            model = base_of(card) if card and name == "base" else name
            opened[name] = engine.make(model, seed)
        return with_deadline(opened[name], timeout_s)

    return open


def player_of(
    config: Config,
    agent: Any,
    policy: Any,
    temperature: float,
    version: Callable[[], int] = lambda: -1,
) -> PolicyPlayer:
    assert isinstance(config, PolicyConfig)
    sampling = sampling_of(config, temperature)
    return PolicyPlayer(agent, policy, sampling, config.timeout_s, config.constrain, version)


def sampling_of(config: PolicyConfig, temperature: float) -> Sampling:
    top_p = 1.0 if temperature == 0 else config.top_p
    stop = tuple(config.stop)
    return Sampling(temperature, top_p, config.max_tokens, stop, config.max_thought)


def judge_of(section: Section) -> JudgeIdentity:
    """What the verdicts of a recipe's judge are known by."""
    config = section.config.model_dump(mode="json")
    rubric: str = config.get("rubric", "")
    return judge_identity(section.use, config, {rubric: rubric_file(rubric)} if rubric else {})


def asked(checkpoint: str, spec: EvalSpec, overrides: Sequence[str]) -> str:
    return json.dumps([checkpoint, sorted(overrides), spec.temperature, spec.judge.dump()])


def default_output(checkpoint: str, spec: EvalSpec, overrides: Sequence[str]) -> Path:
    """Another folder for every way to ask."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", checkpoint.strip("/.")) or "model"
    world = re.sub(r"[^A-Za-z0-9_.-]+", "-", spec.environment.use)
    mark = hashlib.sha256(asked(checkpoint, spec, overrides).encode()).hexdigest()[:6]
    parts = (world, spec.split, str(spec.tasks), str(spec.seed), name, mark)
    return Path("runs") / "evaluations" / "-".join(parts)
