"""The model a run starts from: given, or made here and warmed up, and kept for the next run."""

import asyncio
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from .. import __version__
from ..agents import graft, scratch
from ..core.config import Config, PolicyConfig, WarmStart
from ..core.errors import LearnerError, RecipeError, WorldError
from ..core.files import DRAFT, read_json, write_json
from ..core.hosting.pool import Worlds
from ..core.models.cache import is_made, kept, making
from ..core.models.gguf import resolved
from ..core.models.open import save_merged
from ..core.play.draw import draw, starts
from ..core.play.episode import turn_seed
from ..core.play.players import ExpertPlayer, PolicyPlayer
from ..core.play.rollout import rollouts
from ..core.protocols import Agent, Learner, LearnerFactory, Policy, make_learner
from ..core.recipe import Recipe
from ..core.seeds import derive
from ..core.sources import code_of
from ..core.types import Batch, Completion, Example, Sampling, Start, Trajectory
from .progress import Progress

VALIDATION = 200
"""Tasks on which a warm start's skill is measured."""
MADE = 3
"""Raise this whenever the same settings would give another model."""
WORDS = 4000
"""Expert episodes that a new tokenizer is trained on."""
STORY = "story.json"
"""In the folder of a model made here: how it came about."""
GRAFTED = "grafted"
"""The folder, in that of a model while it is made, of what its warm start begins with."""
UNTRAINED: dict[str, Any] = {
    "environment_steps": 0,
    "tokens_trained": 0,
    "updates": 0,
    "skill": None,
    "wanted": None,
}
"""The story of one that nothing was shown to."""


async def prepare(
    recipe: Recipe,
    worlds: Worlds,
    progress: Progress,
    learner_factory: LearnerFactory = make_learner,
) -> str:
    """The folder or hub id of the base model; made first if nobody has made it yet.

    ``learner_factory`` makes the learner that warms it up.

    Raises:
        ModelError: the model cannot be opened or made.
        RecipeError: it must be made or warmed up, but the world has no expert.
        StoreError: it must be made, and there is no place to keep it.
    """
    config = recipe.policy.config
    assert isinstance(config, PolicyConfig)
    if scratch.is_scratch(config.model):
        scratch.parse(config.model)
    if not made_here(config):
        model = resolved(config.model)
        return str(Path(model).resolve()) if Path(model).is_dir() else model
    folder = kept(key_of(recipe))
    if is_made(folder):
        progress.say(f"base model made earlier: {story_of(folder)}, {folder}")
        _warn(folder, progress)
        return str(folder)
    if _only_grafted(config):
        _graft(recipe, config, folder, progress)
        return str(folder)
    if "expert" not in worlds.abilities:
        raise RecipeError(
            f"policy.model: {config.model} is to be made or warmed up here, but "
            f"{recipe.environment.use} has no expert to learn from; give a trained model, and no "
            "policy.warm_start"
        )
    with making(folder) as draft:
        await _make(recipe, config, worlds, draft, progress, learner_factory)
    return str(folder)


def made_here(config: PolicyConfig) -> bool:
    """Whether the base model is one that this package makes or changes before the run."""
    new = scratch.is_scratch(config.model) or graft.is_graft(config.model)
    return new or config.warm_start is not None


def _only_grafted(config: PolicyConfig) -> bool:
    """Whether the base model hangs on no world: one with an eye that has learned nothing yet."""
    return graft.is_graft(config.model) and config.warm_start is None


def _graft(recipe: Recipe, config: PolicyConfig, folder: Path, progress: Progress) -> None:
    """Make the base model as it is without a warm start, its eye untrained."""
    began = time.monotonic()
    with making(folder) as draft:
        graft.make(config.model, draft, derive(recipe.seed, "graft"))
        story = UNTRAINED | {"key": key_of(recipe), "wall_s": round(time.monotonic() - began, 1)}
        write_json(draft / STORY, story | {"grafted": config.model})
    progress.say(f"base model: {story_of(folder)}")


def story_of(folder: Path) -> str:
    """How a model made here came about, in a few words."""
    story: dict[str, Any] = read_json(folder / STORY)
    if not story["updates"]:
        grafted: str = story.get("grafted", "")
        return f"{grafted}, its eye untrained" if grafted else "untrained"
    words = f"warm start of {story['updates']} updates, {story['wall_s']:.0f} s"
    if story["skill"] is not None:
        words += f", solves {story['skill']:.0%} of {VALIDATION} validation tasks"
    return words


def _warmed(recipe: Recipe, warm: WarmStart | None) -> dict[str, Any] | None:
    if warm is None:
        return None
    adapter = {"adapter": warm.rank} if method_of(recipe) == "lora" else {}
    return warm.model_dump(exclude={"method", "rank"}) | adapter


def made_as(folder: Path) -> str:
    """The ``key_of`` what a model made here was made from."""
    return read_json(folder / STORY).get("key", "")


def _warn(folder: Path, progress: Progress) -> None:
    """Say so if a warm start came to its last update short of the skill it was to reach."""
    story: dict[str, Any] = read_json(folder / STORY)
    if story["skill"] is not None and story["skill"] < story["wanted"]:
        progress.say(
            f"warning: policy.warm_start.skill={story['wanted']:g} was not reached in "
            f"{story['updates']} updates; the base solves {story['skill']:.1%} of {VALIDATION} "
            "validation tasks. For a better one raise policy.warm_start.updates"
        )


def key_of(recipe: Recipe) -> str:
    """A hash of all that a model made here depends on: settings, files and the plug-ins' code."""
    config = recipe.policy.config
    assert isinstance(config, PolicyConfig)
    if _only_grafted(config):
        grafted = [__version__, MADE, graft.identity(config.model), recipe.seed]
        return _digest(grafted)
    played = {"environment": recipe.environment.dump(), "agent": recipe.agent.dump()}
    payload = {
        "version": [__version__, MADE],
        "model": config.model,
        "files": _contents(config.model),
        "warm_start": _warmed(recipe, config.warm_start),
        "sampling": [config.max_tokens, config.stop, config.constrain],
        **played,
        "data": {name: _hash(Path(name)) for name in sorted(_named(played))},
        "code": code_of(recipe.environment.plugin, recipe.agent.plugin),
        # Nobody can tell whether what a world elsewhere consists of is what it was.
        "elsewhere": uuid.uuid4().hex if recipe.fleet.elsewhere else "",
        "seed": recipe.seed,
    }
    return _digest(payload)


def _digest(payload: Any) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()[:24]


def _contents(model: str) -> dict[str, str] | list[str]:
    if graft.is_graft(model):
        return graft.identity(model)
    folder = Path(resolved(model))
    if not folder.is_dir():
        return {}
    return {
        str(file.relative_to(folder)): _hash(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _named(value: Any) -> set[str]:
    """The files that settings name."""
    if isinstance(value, str):
        return {value} if os.path.isfile(value) else set()
    if isinstance(value, Mapping):
        value = list(cast("Mapping[str, Any]", value).values())
    if isinstance(value, list | tuple):
        return {name for one in cast("Sequence[Any]", value) for name in _named(one)}
    return set()


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


async def _make(
    recipe: Recipe,
    config: PolicyConfig,
    worlds: Worlds,
    folder: Path,
    progress: Progress,
    learner_factory: LearnerFactory,
) -> None:
    began, key = time.monotonic(), key_of(recipe)
    agent: Agent = recipe.agent.make()
    warm = config.warm_start
    noise = 0.0 if warm is None else warm.noise
    count = WORDS if warm is None else warm.demonstrations
    expert = ExpertPlayer(agent, noise, recipe.fleet.step_timeout_s)
    tasks = await draw(worlds.tasks("train"), count, derive(recipe.seed, "demonstrations"))
    begin = starts(tasks, 1, recipe.seed)
    seed = derive(recipe.seed, "demonstrations")
    with progress.stage("expert demonstrations", len(begin)) as stage:
        shown = await rollouts(expert, worlds, begin, seed, stage.advance, stepped=stage.stepped)
    examples = [
        example
        for start, trajectory in zip(begin, shown, strict=True)
        for example in _examples(expert, start, trajectory, seed)
    ]
    if not examples:
        raise WorldError(
            f"the expert of {recipe.environment.use} gave up at once on all of {len(begin)} tasks; "
            "there is nothing to warm up on"
        )
    model = _begun(recipe, config, shown, folder)
    steps = sum(len(trajectory.steps) for trajectory in shown)
    story = UNTRAINED | {"key": key, "environment_steps": steps}
    if warm is not None:
        if warm.seconds is not None:
            progress.say(
                f"policy.warm_start.seconds={warm.seconds:g} ends nothing any more; "
                f"policy.warm_start.updates={warm.updates} does"
            )
        learner = learner_factory(*_cloner(recipe, warm), model, recipe.seed)
        arguments = (config, warm, model, worlds, examples, folder, progress)
        story |= await _clone(recipe, learner, *arguments)
    shutil.rmtree(folder / GRAFTED, ignore_errors=True)
    write_json(folder / STORY, story | {"wall_s": round(time.monotonic() - began, 1)})
    progress.say(f"base model: {story_of(folder)}")
    _warn(folder, progress)


def _begun(recipe: Recipe, config: PolicyConfig, shown: Sequence[Trajectory], folder: Path) -> str:
    """What a warm start begins with; made, if it is to be, in ``folder``."""
    if scratch.is_scratch(config.model):
        texts = [text for trajectory in shown[:WORDS] for text in _texts(trajectory)]
        scratch.make(config.model, texts, folder, derive(recipe.seed, "scratch"))
        return str(folder)
    if graft.is_graft(config.model):
        # Apart: what its adapter is merged into is read while the result is written.
        graft.make(config.model, folder / GRAFTED, derive(recipe.seed, "graft"))
        return str(folder / GRAFTED)
    return resolved(config.model)


def _examples(
    expert: ExpertPlayer, start: Start, trajectory: Trajectory, seed: int
) -> list[Example]:
    """What the expert itself did; the errors mixed in are seen, not learned."""
    return [
        Example(step.action.prompt, Completion(step.action.completion.text))
        for turn, step in enumerate(trajectory.steps)
        if not expert.errs(turn_seed(seed, start, turn))
    ]


def _texts(trajectory: Trajectory) -> list[str]:
    seen = [step.observation.text for step in trajectory.steps]
    actions = [step.action.text for step in trajectory.steps]
    return [trajectory.task.instruction, *seen, *actions, trajectory.final.text]


def _cloner(recipe: Recipe, warm: WarmStart) -> tuple[type[Any], Config]:
    """The class and the config of the learner of a warm start."""
    from ..trainers.learning.learner import LearnerConfig, PlainLearner

    settings: dict[str, Any] = {"method": method_of(recipe), "learning_rate": warm.learning_rate}
    settings |= {"batch_size": warm.batch_size, "warmup": 20}
    settings |= {"rank": warm.rank, "alpha": 2 * warm.rank}
    policy = recipe.policy.config
    if isinstance(policy, PolicyConfig) and policy.model.startswith((scratch.SEEING, graft.PREFIX)):
        settings["targets"] = "vision"  # It knows no pictures yet.
    if isinstance(recipe.learner.config, LearnerConfig):
        settings["device"] = recipe.learner.config.device  # One for all of a process's learners.
    return PlainLearner, LearnerConfig.model_validate(settings)


def method_of(recipe: Recipe) -> str:
    """Which weights the warm start changes."""
    config = recipe.policy.config
    assert isinstance(config, PolicyConfig)
    new = scratch.is_scratch(config.model)
    given = config.warm_start.method if config.warm_start else None
    return given or ("full" if new else "lora")


async def _clone(
    recipe: Recipe,
    learner: Learner,
    config: PolicyConfig,
    warm: WarmStart,
    model: str,
    worlds: Worlds,
    examples: Sequence[Example],
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Cloning until the skill or the updates are reached; its story.

    No clock has a say in it: the same recipe gives the same model on machines fast and slow.
    """
    from ..trainers.learning.loss import NLL

    policy = looked_at_by(config, model, recipe.seed)
    agent: Agent = recipe.agent.make()
    tasks = await draw(worlds.tasks("validation"), VALIDATION, derive(recipe.seed, "skill"))
    player = PolicyPlayer(
        agent,
        policy,
        Sampling(0.0, 1.0, config.max_tokens, tuple(config.stop)),
        config.timeout_s,
        config.constrain,
    )
    done, share, tokens = 0, 0.0, 0.0
    loop = asyncio.get_running_loop()
    scratchpad = Path(tempfile.mkdtemp(prefix=DRAFT, dir=folder))  # Known to be writable.
    try:
        with progress.stage("warm start", warm.updates, "updates") as stage:
            while done < warm.updates:
                count = min(warm.check_every, warm.updates - done)
                batch = _cycle(examples, done * warm.batch_size, count * warm.batch_size)
                metrics = await loop.run_in_executor(None, learner.update, Batch(NLL(), batch), 0.0)
                tokens += metrics["train/tokens"]
                done += count
                stage.advance(done)
                if warm.skill is None:
                    continue
                learner.export(scratchpad)
                await policy.load(scratchpad)
                played = await rollouts(player, worlds, starts(tasks, 1, recipe.seed), recipe.seed)
                share = sum(t.success for t in played) / len(played)
                if share >= warm.skill:
                    break
        await loop.run_in_executor(None, _save, recipe, learner, scratchpad, folder)
    finally:
        shutil.rmtree(scratchpad, ignore_errors=True)
        await policy.close()
    if warm.skill is not None and share == 0:
        raise LearnerError(
            f"the warm start solves none of {len(tasks)} validation tasks after {done} updates; "
            "give it more updates, or an easier world"
        )
    skill = None if warm.skill is None else share
    reached = {"skill": skill, "wanted": warm.skill}
    return {"updates": done, "tokens_trained": int(tokens)} | reached


def _save(recipe: Recipe, learner: Learner, scratchpad: Path, folder: Path) -> None:
    """As a whole model, whatever the learner changed."""
    if method_of(recipe) == "full":
        learner.export(folder)
        return
    learner.export(scratchpad)
    trust = getattr(recipe.policy.config, "trust_remote_code", False)
    save_merged(str(scratchpad), folder, trust)


def looked_at_by(config: PolicyConfig, model: str, seed: int) -> Policy:
    """Who plays for a warm start: in this process, as its weights change all the time."""
    from ..agents.engines.transformers import TransformersConfig, TransformersPolicy

    if not isinstance(config, TransformersConfig):
        known = {key: getattr(config, key) for key in PolicyConfig.model_fields}
        config = TransformersConfig.model_validate(known)
    return TransformersPolicy(config, model, seed)


def _cycle(examples: Sequence[Example], begin: int, count: int) -> tuple[Example, ...]:
    return tuple(examples[k % len(examples)] for k in range(begin, begin + count))
