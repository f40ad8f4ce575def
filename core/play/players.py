"""Who acts: a policy through its agent, a world's own expert, chance."""

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

from ..checked import checked_completion, no_text
from ..errors import PolicyError
from ..hosting.world import World
from ..protocols import Agent, Policy
from ..types import (
    Action,
    Completion,
    Constraint,
    Observation,
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

    async def answer(
        self, task: Task, history: Sequence[Step], observation: Observation, seed: int
    ) -> Action:
        """What it does; no world is needed for that.

        Raises:
            PolicyError: what was said, or what the agent made of it, is no text.
        """
        sampling = self.sampling
        if self.constrain:
            sampling = replace(sampling, constraint=constraint_of(self.agent, observation))
        prompt = sharing(self.agent.prompt(task, history, observation), history)
        version = self.version()
        async with deadline(self.timeout_s, "the policy's completion"):
            completion = await self.policy.complete(prompt, sampling, seed)
        completion = replace(checked_completion(completion, self.name), version=version)
        parsed = self.agent.parse(completion.text, observation)
        for text in (parsed.action, parsed.invalid):
            if fault := no_text(text):
                raise PolicyError(f"{type(self.agent).__name__}.parse gave {fault}; wanted a str")
        return Action(parsed.action, completion, prompt, parsed.invalid)


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
    before, now = history[-1].action.prompt.messages, prompt.messages
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
