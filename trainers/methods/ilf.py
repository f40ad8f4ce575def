"""Imitation learning from language feedback: refine what failed, imitate what that made good."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ...core.files import read_json, write_json
from ...core.play.asking import ask
from ...core.protocols import Context, Plan
from ...core.seeds import derive
from ...core.store import read_trajectories, write_trajectories
from ...core.types import Action, Batch, Completion, Example, Judged, Prompt, Start, Step
from ..learning.examples import asked, example
from ..parts.credit import TrainerConfig, by_task, score
from ..parts.feedback import (
    About,
    Item,
    Pool,
    Source,
    failures,
    known,
    read_feedback,
    refining,
    shuffled,
    with_feedback,
)
from ..parts.selection import Select, candidates, shares

REFINER = "refiner"
"""Where, beside the policy's, the episodes are kept that a refiner learns."""


class ILFConfig(TrainerConfig):
    attempts_per_task: int = Field(default=30, ge=1)
    feedback: Source | Literal["file"] = "world"
    """Whose: what the world answered, what the judge said, the policy's own, or ``file``'s. With
    ``none`` the refiner is only told that it failed."""
    file: str = ""
    """With ``feedback: file``: JSON lines {"trajectory": row, "step": index, "feedback": words}; a
    better answer, if somebody wrote one, as "refinement" (it is tried as those of a refiner)."""
    trajectories: str = ""
    """The attempts at training tasks that ``file`` is about: a folder of episodes, as runs store
    them (an iteration's)."""
    about: About = "last"
    """Which action of a failed attempt is refined: the last one, or one drawn at random."""
    pool: Pool = "unsolved"
    """Whose failures: of tasks that no attempt solved, or of any."""
    shuffle: bool = False
    """Give every attempt another one's feedback: what is left then is not due to it."""
    threshold: float = Field(default=1.0, ge=0, le=1)
    """The score that an attempt must miss to be refined, and a refinement reach by ``reward``."""
    refinements: int = Field(default=30, ge=1)
    """Sampled for every attempt that feedback was given on."""
    unit: Literal["turn", "episode"] = "turn"
    """What is refined: an action, answered by the world; or one action of an episode, which the
    policy then plays on to its end."""
    refiner: str = ""
    """Empty: the policy; else a model folder or hub id, a teacher or one trained to refine."""
    learns: Literal["policy", "refiner", "both"] = "policy"
    """What the model of this run is: the ``policy``, from task to refinement; the ``refiner`` of
    another run, from task, attempt and feedback to refinement, as Chen et al. train one on those
    that people wrote (that run then names this one's folder as ``refiner``); ``both`` at once."""
    layout: Literal["conversation", "blocks"] = "conversation"
    """How a refiner is asked: as the world would go on, or with labelled blocks."""
    select: Select = "reward"
    """Which refinement is learned: a random one of those that reach ``threshold``; the one that
    the policy itself finds to follow the feedback best; the one most like it; any."""
    restart: bool = True
    """Learn all rounds' refinements from the base model on, instead of the new ones from here."""
    beta: float | None = Field(default=None, ge=0)
    """None: one refinement a task, of weight 1. Else all that were tried, weighed in proportion to
    exp(beta * score), a task's together as one."""

    @model_validator(mode="after")
    def _file(self) -> Self:
        if {self.feedback == "file"} != {bool(self.file), bool(self.trajectories)}:
            raise ValueError("feedback: file, file: PATH and trajectories: PATH go together")
        if self.file:
            self.items()
        return self

    def items(self) -> list[Item]:
        """What ``file`` says. Raises: ValueError: it does not fit ``trajectories``."""
        given = read_trajectories(Path(self.trajectories))
        return read_feedback(Path(self.file), given, self.threshold)


class ILF:
    """Sample, get feedback, refine, select, fine-tune on task -> refinement, feedback left out.

    Chen et al. 2023 (arXiv:2303.16749): refinements of failures that pass, one per task, chosen
    at random, all of one weight. Scheurer et al. 2023 (arXiv:2303.16755): ``select: instruct`` with
    ``pool: failed``, ``threshold: 1``. Every round learns the union of all rounds from the base.

    Departures: the refiner is the policy unless another model is named; one that is trained to
    refine is a run of its own (``learns: refiner``). Feedback is the world's unless it is asked for
    otherwise, and is not filtered by who is right or how much was edited. Which failure of a task
    is refined is drawn at random; what succeeded is not refined, as it is by Scheurer et al.
    ``instruct`` asks the policy in training, not another model, and compares the answers yes and
    no whole, end token included, not two tokens. ``beta`` weighs without the correction 1 / q.
    Sampling is as the policy's (the papers': temperature 0.8 and 1), epochs are 1 (the code's 2).
    """

    Config = ILFConfig
    replays = True

    def __init__(self, config: ILFConfig, context: Context) -> None:
        self._config = config
        self._context = context
        self._given: list[Item] = []
        self._round = 0
        self._kept: list[Judged] = []
        """What a policy learns: the refined action of each is the last one that was replayed."""
        self._refined: list[Judged] = []
        """What a refiner learns: the same, as they were asked for."""

    async def begin(self) -> None:
        if self._config.file:
            self._given = await known(self._config.items(), self._context)

    @property
    def plan(self) -> Plan:
        config = self._config
        if config.file:
            return Plan(0, 0)
        turns = 1 if config.unit == "turn" else None
        return Plan(config.tasks_per_iteration, config.attempts_per_task, turns)

    async def batches(self, judged: Sequence[Judged]) -> list[Batch]:
        config, context = self._config, self._context
        found = (config.threshold, config.pool, config.about, self._seed("pool"))
        items = self._given or failures(judged, *found)
        if config.feedback != "file":
            items = await with_feedback(items, config.feedback, context, self._seed("feedback"))
        if config.shuffle:
            items = shuffled(items, self._seed("shuffle"))
        chosen = await self._refine(items)
        number = config.refinements
        plain = [without_feedback(one, items[one.trajectory.attempt // number]) for one in chosen]
        if not config.restart:
            self._kept, self._refined = [], []
        self._kept += plain if config.learns != "refiner" else []
        self._refined += chosen if config.learns != "policy" else []
        self._round += 1
        examples = self._examples(self._kept, None) + self._examples(self._refined, 1)
        return [Batch(config.nll, tuple(examples), config.epochs, config.restart)] if chosen else []

    def _seed(self, *parts: int | str) -> int:
        return derive(self._context.seed, "ilf", self._round, *parts)

    async def _refine(self, items: Sequence[Item]) -> list[Judged]:
        """The refinements to learn, as episodes with the prompts that asked for them.

        One per task, unless they are weighed.
        """
        config, context = self._config, self._context
        name = config.refiner or "policy"
        policy = await context.open(name)
        many = config.refinements
        prompts = [refining(item, config.layout, context) for item in items]
        asked = [prompt for item, prompt in zip(items, prompts, strict=True) if not item.refinement]
        every = [prompt for prompt in asked for _ in range(many)]
        completions = iter(
            await ask(policy, every, context.sampling_of(name), self._seed("refine"))
        )
        starts: list[Start] = []
        for k, item in enumerate(items):
            if item.refinement:
                refinements = [Completion(item.refinement)]
            else:
                refinements = [one for one in islice(completions, many) if one is not None]
            seed = self._seed("pick", item.trajectory.task.id, item.step)
            tried = await candidates(context, item, refinements, config.select, seed)
            for number, one in enumerate(tried):
                starts.append(self._start(item, prompts[k], one, k * many + number))
        played = await context.attempt(starts) if starts else []
        chosen: list[Judged] = []
        for group in by_task(played):
            if config.beta is not None:
                chosen += group
                continue
            seed = self._seed("select", group[0].trajectory.task.id)
            decides = config.select == "reward"
            passed = [one for one in group if not decides or score(one) >= config.threshold]
            chosen += random.Random(seed).sample(passed, min(1, len(passed)))
        return chosen

    def _start(self, item: Item, prompt: Prompt, refined: Completion, attempt: int) -> Start:
        trajectory, seen = item.trajectory, item.old_step.observation
        parsed = self._context.agent.parse(refined.text, seen)
        action = Action(parsed.action, refined, prompt, parsed.invalid)
        prefix = (*trajectory.steps[: item.step], Step(seen, action, 0.0))
        turns = 0 if self._config.unit == "turn" else None
        return Start(trajectory.task, trajectory.seed, attempt, prefix, turns, trajectory.id)

    def _examples(self, kept: Sequence[Judged], most: int | None) -> list[Example]:
        """The refined action of each and those after it, ``most`` together; None: all."""
        beta = self._config.beta
        examples: list[Example] = []
        for group in by_task(kept):
            scores = [score(one) for one in group]
            weights = [1.0] * len(group) if beta is None else shares(scores, beta)
            for one, weight in zip(group, weights, strict=True):
                turns = (one.trajectory.replayed - 1, *one.trajectory.turns)
                examples += [example(one.trajectory, turn, weight) for turn in turns[:most]]
        return examples

    def save(self, folder: Path, images: Path) -> None:
        write_json(folder / "ilf.json", {"round": self._round})
        write_trajectories(folder, self._kept, images)
        if self._refined:
            (folder / REFINER).mkdir()
            write_trajectories(folder / REFINER, self._refined, images)

    def restore(self, folder: Path) -> None:
        self._round = read_json(folder / "ilf.json")["round"]
        self._kept = read_trajectories(folder)
        there = (folder / REFINER).is_dir()
        self._refined = read_trajectories(folder / REFINER) if there else []


def without_feedback(one: Judged, item: Item) -> Judged:
    """A refinement as an answer to the task's own prompt, which is how it is learned."""
    trajectory = one.trajectory
    steps = list(trajectory.steps)
    if len(steps) <= item.step:
        return one  # The world broke before it.
    action = replace(steps[item.step].action, prompt=asked(item.trajectory, item.step))
    steps[item.step] = replace(steps[item.step], action=action)
    return replace(one, trajectory=replace(trajectory, steps=tuple(steps)))
