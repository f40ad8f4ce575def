"""What the rooms promise one another. Nothing inherits from these; a class fits or it does not.

How plug-ins are made, by the name of their entry-point group:

    selfwright.environments   World(config)
    selfwright.agents         Agent(config)
    selfwright.judges         Judge(config)
    selfwright.trainers       Trainer(config, context)
    selfwright.policies       Policy(config, model, seed)
    selfwright.learners       Learner(config, model, seed)

``config`` is an instance of the class's nested ``Config``, which derives from
``core.config.Config``; a policy's from ``PolicyConfig``, a judge's from ``JudgeConfig`` there.
A policy's class may have a static ``unfit(config, learner)``, which says why it could not load what
a learner with such settings makes; empty if it can.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from .config import Config, Shot
from .models.tokens import ChatTokens
from .types import (
    Batch,
    Completion,
    Judged,
    Metrics,
    Observation,
    Parsed,
    Prompt,
    Sampling,
    Start,
    Step,
    Task,
    TimeStep,
    Tool,
    Trajectory,
    Verdict,
)


class Tasks(Protocol):
    """A split of a world, wherever that lives; counted from 0."""

    async def size(self) -> int: ...
    async def take(self, indices: Sequence[int]) -> list[Task]:
        """Raises: IndexError: there is no such place. WorldError: there is no task."""
        ...


class Environment(Protocol):
    """A world. One instance plays one episode at a time; ``reset`` may be called again.

    What its class says of itself stands in one record, ``spec`` (``core.types.WorldSpec``), which
    may be left out. What it can do beyond this is what it has methods for: ``HasExpert``,
    ``HasRandom``, ``HasAttempts``, ``HasNamedTasks``, ``HasSnapshots``. Methods may be plain or
    async. A world that knows nothing of our types may give what ``core.hosting.far_end`` lists.
    """

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of ``train``, ``validation`` or ``test``: disjoint, the same on every call.

        May be huge and lazy; only ``len`` and single items are asked for.
        """
        ...

    async def reset(self, task: Task, seed: int) -> Observation:
        """``seed``: in [0, 2**63), as all seeds are; generators that take less need a share of it,
        such as ``seed % 2**32``."""
        ...

    async def step(self, action: str) -> TimeStep: ...
    async def close(self) -> None: ...


class HasExpert(Protocol):
    """A world that can show how it is done."""

    async def expert(self) -> str | None:
        """A good next action from the present state; None if it knows none from here."""
        ...


class HasRandom(Protocol):
    """A world without listed actions that can still draw one uniformly."""

    async def random(self, seed: int) -> str: ...


class HasAttempts(Protocol):
    """A world where every action is a whole attempt at the task; a right one is paid 1."""

    def answer(self, task: Task, action: str) -> str | None:
        """The answer an attempt gives, in one canonical form, without looking at the right one.

        None if the attempt is not a legal one (it then casts no vote). Asked once, when the action
        is executed; it is kept with the step (there an illegal one is the empty text).
        """
        ...

    def without_oracle(self) -> "Environment":
        """The same world, but it never says whether an attempt was right and never ends early.

        Rewards are still paid, for the evaluator to see; observations do not depend on them.
        """
        ...


class HasNamedTasks(Protocol):
    """A world that knows its training tasks by their ids, however many there are."""

    def named(self, id: str) -> Task:
        """Raises: ValueError: there is no such task, or it is not for training."""
        ...


class HasSnapshots(Protocol):
    """A world that can go on from a state that it was in, in another instance, too.

    So that an episode which begins in the midst of another one need not be replayed.
    """

    async def snapshot(self) -> str:
        """The present state, as a text that ``restore`` understands in any instance of the world
        with the same settings, whatever process it is in."""
        ...

    async def restore(self, task: Task, snapshot: str) -> Observation:
        """In place of ``reset``: the state, of an episode of ``task``, and what is seen in it.

        All that comes after is as it would have been there.
        """
        ...


class Agent(Protocol):
    """How a model reads and acts: two pure functions, no I/O."""

    def prompt(self, task: Task, history: Sequence[Step], observation: Observation) -> Prompt: ...
    def parse(self, text: str, observation: Observation, /) -> Parsed:
        """A completion's text as an action; ``observation`` is what it answers."""
        ...


class HasPhrase(Protocol):
    """An agent whose completions are not the actions themselves."""

    def phrase(self, action: str) -> str:
        """How it says an action; ``parse`` gives the action back."""
        ...


class HasMore(Protocol):
    """An agent that may read several actions in one completion; ``parse`` gives the first."""

    def parse_more(self, text: str, place: int, observation: Observation) -> Parsed | None:
        """The one at ``place``, from 1 on, when the world shows ``observation``; None: no more."""
        ...


@dataclass(frozen=True)
class Briefing:
    """What an agent may be told of its world before it acts, once for a whole run."""

    tools: tuple[Tool, ...] = ()
    """What the world says may be done (``WorldSpec.tools``)."""
    shots: tuple[Shot, ...] = ()
    """Training tasks that its expert did; one more than the agent wants to show."""


class Briefed(Protocol):
    """What the class of an agent has beside, if it wants a briefing.

    What it is told becomes part of its config, so that whoever plays a checkpoint later, perhaps
    without the world, has the very same agent.
    """

    @staticmethod
    def shots(config: Any, /) -> int:
        """How many it wants to show; 0 for none."""
        ...

    @staticmethod
    def briefed(config: Any, briefing: Briefing, /) -> Config: ...


class Policy(Protocol):
    """A served model. ``checkpoint`` names the weights that answer."""

    @property
    def checkpoint(self) -> str: ...
    def batch_slot(self) -> AbstractContextManager[None]:
        """Held by whoever will soon ask for a completion.

        A policy that batches waits until every slot's holder has asked, so that the make-up of
        its batches, and with it every sampled token, does not hang on timing.
        """
        ...

    async def complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion: ...
    async def score(self, prompt: Prompt, completion: Completion, /) -> Completion:
        """``completion`` with this policy's own log-probabilities of it.

        Its ids are kept if they are of this policy's vocabulary, else they are those of its text.
        """
        ...

    async def load(self, checkpoint: Path | None) -> None:
        """Answer with these weights from now on; None is the base model."""
        ...

    async def close(self) -> None: ...


@runtime_checkable
class HasEmbeddings(Protocol):
    """A policy that can also say how alike texts are."""

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One vector each, all of one length."""
        ...


@runtime_checkable
class HasTokens(Protocol):
    """A policy whose tokenizer is here, so that prompts can be measured and checked."""

    @property
    def tokens(self) -> ChatTokens: ...


@runtime_checkable
class HasStream(Protocol):
    """A policy that can be heard while it speaks."""

    async def stream(
        self,
        prompt: Prompt,
        sampling: Sampling,
        seed: int,
        heard: Callable[[Sequence[int]], None],
    ) -> Completion:
        """As ``complete``; ``heard`` is told now and then of all ids sampled so far.

        They may begin anew, where a server was lost on the way.
        """
        ...


class Judge(Protocol):
    """One verdict per trajectory, in order. All trajectories of one call share one task."""

    async def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]: ...


@runtime_checkable
class AsksPolicies(Protocol):
    """A judge that asks models: it is told how to find them before it judges."""

    def ask_through(self, open: Callable[[str], Awaitable[Policy]]) -> None:
        """``open``: as ``Context.open``, and ``policy`` is the one in training or under test."""
        ...


class Learner(Protocol):
    """The weights in training and their optimiser: the only thing that touches a gradient.

    Optional class attribute: ``shares`` is True for one that works in several processes at once
    (``accelerate launch``). Each of them then makes it and makes the same calls; only process 0
    may write.
    """

    def update(self, batch: Batch, progress: float) -> Metrics:
        """Learn ``batch``. ``progress`` in [0, 1] is the share of the run done, for schedules.

        The metrics hold ``train/tokens``, those that went forward and backward, at least.
        """
        ...

    def export(self, folder: Path) -> None:
        """Write what a policy loads: a PEFT adapter folder, or a whole model with tokenizer."""
        ...

    def save(self, folder: Path) -> None:
        """Write all that ``restore`` needs to go on as if nothing had happened."""
        ...

    def restore(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What the loop plays before it calls the trainer, each iteration."""

    tasks: int
    attempts: int
    """Per task: the size of a group."""
    turns: int | None = None
    """Actions per episode; None: to its end."""
    player: str = "policy"
    """``policy``, or a name as ``Context.play_as`` has it."""


LearnerFactory: TypeAlias = Callable[[type[Any], Config, str, int], Learner]
"""Makes a learner of this class with this config, for this model and seed."""


def make_learner(plugin: type[Any], config: Config, model: str, seed: int) -> Learner:
    """The ``LearnerFactory`` of a process by itself."""
    return plugin(config, model, seed)


Attempt: TypeAlias = Callable[[Sequence[Start]], Awaitable[list[Judged]]]
"""Plays and judges episodes, in order; they also go to the run's store and are counted.

As many of the first ones come back as the recipe's budget still covers, groups whole."""


@dataclass(frozen=True)
class Context:
    """What a trainer may use besides the judged trajectories it is handed."""

    agent: Agent
    judge: Judge
    policy: Policy
    """The policy in training, for trainers that ask it something outside a world."""
    attempt: Attempt
    """With the policy in training."""
    attempt_blind: Attempt
    """The same, where the world never says whether an attempt was right and goes on after it.
    Raises WorldError for worlds without attempts (see ``HasAttempts``)."""
    play_as: Callable[[str], Awaitable[Attempt]]
    """Somebody else, as a teacher: ``expert`` is the world's own, other names as in ``open``.
    ``await (await play_as(name))(starts)``."""
    open: Callable[[str], Awaitable[Policy]]
    """A policy to ask, by name: ``policy`` is the one in training; ``base`` the one that the phase
    began with, frozen; else one of the recipe's ``policies``, a model's folder, a run's, a hub id.
    Opened once, closed by the run."""
    model_of: Callable[[str], str]
    """The folder or hub id of the model that such a name stands for."""
    sampling_of: Callable[[str], Sampling]
    """How the policy of such a name is sampled in training."""
    named: Callable[[str], Awaitable[Task]]
    """The training task of an id. Raises ValueError: there is none."""
    base: str
    """The model the phase began with: a folder or hub id, for trainers that copy it."""
    seed: int
    """The run's: what a trainer draws is derived from it, and from what it is drawn for."""


class Trainer(Protocol):
    """Where the advantages come from: judged trajectories in, batches to learn out, in order.

    Optional class attribute: ``replays`` is True for one whose starts have a prefix. Worlds that
    cannot be replayed are refused with it, and of those that can, states are kept to go on from.
    """

    @property
    def plan(self) -> Plan: ...
    async def batches(self, judged: Sequence[Judged]) -> list[Batch]: ...


def replays(plugin: type[Any]) -> bool:
    """Whether a trainer's starts have a prefix."""
    return bool(getattr(plugin, "replays", False))


@runtime_checkable
class LooksFirst(Protocol):
    """A trainer that was given something to look at before anything is played."""

    async def begin(self) -> None:
        """Raises: RecipeError: it is not fit."""
        ...


@runtime_checkable
class HasStarts(Protocol):
    """A trainer that says itself which episodes an iteration begins with, in place of ``plan``'s
    tasks, each so many times: curricula, search, self-play."""

    async def starts(self, tasks: Tasks, index: int, seed: int) -> Sequence[Start]:
        """The starts of iteration ``index``, from 0.

        Args:
            tasks: the training split. Tasks of its own making will do as well, if they are of the
                world's class.
            seed: the iteration's: the same when a killed run goes on.
        """
        ...


@runtime_checkable
class HasFindings(Protocol):
    """A trainer that measures something."""

    @property
    def findings(self) -> Metrics:
        """Of the last ``batches``; they join the iteration's metrics."""
        ...


@runtime_checkable
class HasGuards(Protocol):
    """A trainer that watches what it learns from."""

    @property
    def alarm(self) -> str:
        """Why the run should end, with nothing learned in this iteration; empty if all is well."""
        ...

    @property
    def trusted(self) -> int:
        """After so many of the phase's iterations, at least 1, what was learned was best; an alarm
        takes the run back there."""
        ...


@runtime_checkable
class HasMemory(Protocol):
    """A trainer that remembers something from one iteration to the next."""

    def save(self, folder: Path, images: Path) -> None:
        """Write all that ``restore`` needs into this empty folder; ``images`` are the run's."""
        ...

    def restore(self, folder: Path) -> None: ...
