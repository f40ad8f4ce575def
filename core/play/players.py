"""Who acts: a policy through its agent, a world's own expert, chance."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

from ..checked import checked_completion, no_text
from ..errors import PolicyError, PromptTooLong
from ..hosting.world import World
from ..protocols import Agent, Policy
from ..types import (
    Action,
    Completion,
    Constraint,
    Observation,
    Parsed,
    Prompt,
    Sampling,
    Step,
    Task,
)
from .waiting import deadline


class Player(Protocol):
    """Whoever acts."""

    @property
    def name(self) -> str: ...
    def batch_slot(self) -> AbstractContextManager[None]: ...
    async def act(
        self,
        world: World,
        task: Task,
        history: Sequence[Step],
        observation: Observation,
        seed: int,
    ) -> Action | None:
        """The next action; None gives up."""
        ...


@dataclass(frozen=True)
class PolicyPlayer:
    """A model, through its agent."""

    agent: Agent
    policy: Policy
    sampling: Sampling
    timeout_s: float = 600.0
    constrain: bool = False
    """Hold completions to what the agent reads as actions."""
    version: Callable[[], int] = lambda: -1
    """From how many iterations the policy has learned by now; -1: unknown."""

    @property
    def name(self) -> str:
        return self.policy.checkpoint

    def batch_slot(self) -> AbstractContextManager[None]:
        return self.policy.batch_slot()

    async def act(
        self,
        world: World,
        task: Task,
        history: Sequence[Step],
        observation: Observation,
        seed: int,
    ) -> Action | None:
        return await self.answer(task, history, observation, seed)

    def more(self, history: Sequence[Step], observation: Observation) -> Action | None:
        """The next action of the last answer; None: it held no more, or one could not be read."""
        read: Callable[[str, int, Observation], Parsed | None] | None
        read = getattr(self.agent, "parse_more", None)
        if read is None or not history or history[-1].action.invalid:
            return None
        if history[-1].actor != observation.actor:
            return None  # It is another one's turn.
        place = history[-1].action.place + 1
        parsed = read(history[-place].action.completion.text, place, observation)
        if parsed is None:
            return None
        self._check(parsed)
        return Action(parsed.action, Completion(""), invalid=parsed.invalid, place=place)

    async def answer(
        self, task: Task, history: Sequence[Step], observation: Observation, seed: int
    ) -> Action:
        """What it does, asked only if nothing is left of its last answer; no world is needed.

        Raises:
            PolicyError: what was said, or what the agent made of it, is no text.
            PromptTooLong: the prompt is, with no more than one turn before.
        """
        if (left := self.more(history, observation)) is not None:
            return left
        sampling = self.sampling
        if self.constrain:
            sampling = replace(sampling, constraint=constraint_of(self.agent, observation))
        version = self.version()
        async with deadline(self.timeout_s, "the policy's completion"):
            prompt, completion, left_out = await self._asked(
                task, history, observation, sampling, seed
            )
        completion = replace(checked_completion(completion, self.name), version=version)
        parsed = self.agent.parse(completion.text, observation)
        self._check(parsed)
        return Action(parsed.action, completion, prompt, invalid=parsed.invalid, left_out=left_out)

    async def _asked(
        self,
        task: Task,
        history: Sequence[Step],
        observation: Observation,
        sampling: Sampling,
        seed: int,
    ) -> tuple[Prompt, Completion, int]:
        """With how many of the oldest turns left out, as few as ``omissions`` and the model let."""
        refused: PromptTooLong | None = None
        before: Prompt | None = None
        for left_out in omissions(history):
            prompt = self.agent.prompt(task, without(history, left_out), observation)
            if prompt == before:
                continue  # It does not show those turns anyway.
            before = prompt = sharing(prompt, history)
            try:
                return prompt, await self.policy.complete(prompt, sampling, seed), left_out
            except PromptTooLong as error:
                refused = error
        assert refused is not None, "it was asked at least once"
        raise refused

    def _check(self, parsed: Parsed) -> None:
        for text in (parsed.action, parsed.invalid):
            if fault := no_text(text):
                raise PolicyError(f"{type(self.agent).__name__}.parse gave {fault}; wanted a str")


def omissions(history: Sequence[Step]) -> Iterator[int]:
    """How many of the oldest turns to leave out, from as many as were at the last turn.

    0, then 1, 2, 4, 8, and at most all but one. As the number doubles, the prompts of an episode
    that has outgrown its model still go on from one another most of the time.
    """
    most = max(0, sum(not step.action.place for step in history) - 1)
    count = min(most, next((s.action.left_out for s in reversed(history) if not s.action.place), 0))
    while count < most:
        yield count
        count = max(1, 2 * count)
    yield most


def without(history: Sequence[Step], turns: int) -> Sequence[Step]:
    """``history`` but for its oldest ``turns``; what was seen first stays: it may hold the task."""
    if not turns:
        return history
    answers = [k for k, step in enumerate(history) if not step.action.place]
    first = replace(history[answers[turns]], observation=history[0].observation)
    return [first, *history[answers[turns] + 1 :]]


def constraint_of(agent: Agent, observation: Observation) -> Constraint | None:
    """What a completion may be for ``agent`` to read an action in it; None: anything.

    Of an agent that does not say: one of the actions that the world lists, if it does.
    """
    says: Callable[[Observation], Constraint | None] | None = getattr(agent, "constraint", None)
    if says is not None:
        return says(observation)
    return Constraint(observation.actions) if observation.actions else None


def sharing(prompt: Prompt, history: Sequence[Step]) -> Prompt:
    """``prompt``, holding the very messages that the one before began with.

    So the prompts of an episode take memory in proportion to its turns, not to their square.
    """
    if not history:
        return prompt
    asked = history[-1 - history[-1].action.place]
    before, now = asked.action.prompt.messages, prompt.messages
    same = next(
        (k for k, (a, b) in enumerate(zip(before, now, strict=False)) if a != b),
        min(len(before), len(now)),
    )
    return replace(prompt, messages=before[:same] + now[same:])


@dataclass(frozen=True)
class ExpertPlayer:
    """The world's own expert; with ``noise``, that share of its actions is random instead.

    Its actions carry the prompts that ``agent`` would have shown a model, to be learned from.
    """

    agent: Agent | None = None
    noise: float = 0.0
    timeout_s: float = 30.0
    """Deadline of one action."""
    name: str = "expert"

    def batch_slot(self) -> AbstractContextManager[None]:
        return nullcontext()

    def errs(self, seed: int) -> bool:
        """Whether the action drawn with this seed is a random one."""
        return self.noise > 0 and random.Random(seed).random() < self.noise

    async def act(
        self,
        world: World,
        task: Task,
        history: Sequence[Step],
        observation: Observation,
        seed: int,
    ) -> Action | None:
        async with deadline(self.timeout_s, "the world's expert"):
            text = (
                await uniform(world, observation, seed) if self.errs(seed) else await world.expert()
            )
        if text is None:
            return None
        return unsampled(self.agent, text, task, history, observation)


@dataclass(frozen=True)
class RandomPlayer:
    """Uniform over the listed actions, or over whatever the world calls random.

    Its actions carry prompts as the expert's do.
    """

    agent: Agent | None = None
    timeout_s: float = 30.0
    """Deadline of one action."""
    name: str = "random"

    def batch_slot(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def act(
        self,
        world: World,
        task: Task,
        history: Sequence[Step],
        observation: Observation,
        seed: int,
    ) -> Action | None:
        async with deadline(self.timeout_s, "the world's random action"):
            text = await uniform(world, observation, seed)
        return unsampled(self.agent, text, task, history, observation)


def unsampled(
    agent: Agent | None,
    text: str,
    task: Task,
    history: Sequence[Step],
    observation: Observation,
) -> Action:
    """The action ``text``; with an agent, as a model would have been asked and have answered."""
    if agent is None:
        return Action(text, Completion(text))
    phrase: Callable[[str], str] | None = getattr(agent, "phrase", None)
    completion = Completion(phrase(text) if phrase else text)
    return Action(text, completion, sharing(agent.prompt(task, history, observation), history))


async def uniform(world: World, observation: Observation, seed: int) -> str:
    if observation.actions:
        return random.Random(seed).choice(observation.actions)
    return await world.random(seed)
