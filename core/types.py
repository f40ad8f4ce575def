"""The data that flows through the loop: plain frozen dataclasses, no imports of ours.

tasks -> starts -> trajectories -> judge -> judged -> trainer -> batches -> learner -> policy
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol, TypeAlias

Metrics: TypeAlias = dict[str, float]
"""Scalars for the log, keyed ``area/name`` (``rollout/steps``, ``train/loss``)."""


@dataclass(frozen=True, slots=True)
class Image:
    """A picture, by its content. Its bytes are read where they are needed, by ``core.images``."""

    sha256: str
    """Of the PNG file, 64 hexadecimal digits."""
    width: int
    height: int
    """Pixels."""
    png: bytes = field(default=b"", compare=False, repr=False)
    """The file itself, on its way from a world or a client to the store; empty ever after."""


Part: TypeAlias = str | Image


@dataclass(frozen=True, slots=True)
class Message:
    role: Literal["system", "user", "assistant", "tool"]
    """``tool``: what a function that was called came to."""
    parts: tuple[Part, ...]
    """Text and pictures, in the order in which they are read."""
    token_ids: tuple[int, ...] = ()
    """What a policy sampled, if this is its own earlier turn: it is never re-tokenised."""
    tokenizer: str = ""
    """Whose ``token_ids`` these are, as in ``Completion``."""

    def __post_init__(self) -> None:
        # A text is a sequence of texts, too: each letter would pass for a part.
        if isinstance(self.parts, str):
            raise TypeError(f"Message.parts is {self.parts!r}; wanted a tuple of texts and images")

    @property
    def text(self) -> str:
        """Its words alone."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for part in self.parts if isinstance(part, Image))


@dataclass(frozen=True, slots=True)
class Tool:
    """A kind of action, as models are told of functions they may call."""

    name: str
    description: str
    parameters: str
    """A JSON schema of its arguments, in canonical form (keys sorted, no spaces)."""
    text: str = ""
    """How ``step`` wants a call written, each argument as ``{its name}``; empty: as
    ``name(argument=JSON, ...)``."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a policy is asked."""

    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()
    template: str = ""
    """A JSON object, in canonical form, of the chat template's own variables, such as
    ``{"enable_thinking":false}``; or empty."""

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(image for message in self.messages for image in message.images)


@dataclass(frozen=True, slots=True)
class Observation:
    text: str
    images: tuple[Image, ...] = ()
    """Oldest first. A world makes them of PNG files: ``core.images.picture``."""
    actions: tuple[str, ...] = ()
    """Every action legal now, if the world lists them; empty means free text."""
    actor: str = ""
    """Whose turn it is, in worlds where several act."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a completion may be: one of some texts, or a text of a grammar."""

    choices: tuple[str, ...] = ()
    """Exactly one of these, in the tokens that the tokenizer makes of it."""
    grammar: str = ""
    """If there are no choices: a Lark grammar as llguidance reads it; in any tokens."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample one completion."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    """The completion ends before the first of these texts."""
    thought: int | None = None
    """The most tokens of a thought: an answer whose ``<think>`` has not ended by then is cut."""
    constraint: Constraint | None = None
    """What it may be; neither length nor a stop text cuts one of its choices."""


@dataclass(frozen=True, slots=True)
class Completion:
    text: str
    """Decoded, without the end token and without stop texts."""
    token_ids: tuple[int, ...] = ()
    """(T,) as sampled, the end token included, never re-tokenised; empty if not sampled."""
    logprobs: tuple[float, ...] = ()
    """(T,) nats, of the model's own distribution (temperature 1, unconstrained); or empty."""
    finish: Literal["stop", "length", ""] = ""
    """``length``: cut at ``max_tokens``. Empty if not sampled."""
    tokenizer: str = ""
    """Fingerprint of the vocabulary that ``token_ids`` belong to: to any other they mean nothing,
    and ``text`` stands for them. Empty: the reader's own."""
    version: int = -1
    """From how many of its run's iterations the policy had learned when it was asked; -1: unknown.
    What answered had learned from as many or, if weights were loaded meanwhile, from more."""
    constraint: Constraint | None = None
    """What it was held to as it was sampled."""
    constrained: tuple[float, ...] = ()
    """(T,) nats, of the model's distribution over the tokens that the constraint allows
    (temperature 1); empty where there was none."""


@dataclass(frozen=True, slots=True)
class Action:
    text: str
    """What the environment executes."""
    completion: Completion
    """What the model said; ``text`` was parsed from it."""
    prompt: Prompt = Prompt()
    """What the completion was sampled from, or, where it was not sampled, what the model would
    have been shown. Nobody renders it again: with a window, memory or other goals a later prompt
    is another one. Empty where nobody was asked."""
    invalid: str = ""
    """Why no action could be read from the completion; empty if one could."""
    place: int = 0
    """Which of the actions of one answer it is, for agents that read several in one. Above 0 nobody
    was asked anew: the completion and the prompt are empty, and those of the step that many before
    hold it."""
    left_out: int = 0
    """How many of the episode's oldest turns the prompt leaves out, as the model reads no more."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What an agent read in a completion: an action, or why there is none."""

    action: str
    """What the environment is to execute; empty if there is none."""
    invalid: str = ""
    """Why no action could be read, in words for the model; empty if one could."""


@dataclass(frozen=True, slots=True)
class TimeStep:
    observation: Observation
    reward: float
    """What this action earned, undiscounted."""
    terminated: bool
    """The task itself ended, well or badly."""
    truncated: bool = False
    """The environment's own limit cut the episode."""
    success: bool = False
    """The task is solved. May be true only together with ``terminated``."""
    answer: str | None = None
    """As in ``Step``; filled in for worlds of attempts (``core.protocols.HasAttempts``)."""


@dataclass(frozen=True, slots=True)
class Step:
    observation: Observation
    """What the agent saw before it acted."""
    action: Action
    reward: float
    """What the environment paid for this action, undiscounted."""
    answer: str | None = None
    """The answer that this action gives to the task, in the world's canonical form, where every
    action is a whole attempt; empty if it is no legal one. None in all other worlds."""

    @property
    def actor(self) -> str:
        """Who acted; empty where there is only one."""
        return self.observation.actor


@dataclass(frozen=True)
class Task:
    """One thing to be done.

    Environments subclass it to add typed fields (a start URL, numbers), which are stored and come
    back; such a world's spec names the class.
    """

    id: str
    """Unique over all splits of one world."""
    instruction: str
    max_steps: int
    """The most actions an agent may take, at least 1."""


@dataclass(frozen=True, slots=True)
class WorldSpec:
    """What a world's class says of itself, as ``spec``; every field has a default."""

    isolation: Literal["inline", "process"] = "process"
    """``inline``: it never blocks; it then runs in this very process, thousands at once."""
    per_process: int | None = None
    """How many instances a process of its own hosts. None: 1; of one that never blocks, all."""
    task: type[Task] = Task
    """The class of its tasks, so that stored ones can come back."""
    reward_range: tuple[float, float] = (0.0, 1.0)
    """The least and the most that an episode may pay."""
    tools: tuple[Tool, ...] = ()
    """The kinds of its actions, if they are calls, for agents that show them to models. ``step``
    still gets one text, such as ``click(ref="e7")``."""
    repeatable: Literal["exact", "text", "no"] = "exact"
    """What comes again of an episode when its task, seed and actions do: all of it, its texts and
    rewards, or nothing one could rely on. Trainers that replay refuse ``no``."""
    start_timeout_s: float = 60.0
    """How long it may take to start a process and make an instance."""
    recycle_after: int | None = None
    """Episodes after which a process is replaced, for worlds that grow; None: never."""


class Stop(StrEnum):
    """Why an episode ended."""

    TERMINATED = "terminated"
    """The world ended it."""
    TRUNCATED = "truncated"
    """A limit on steps cut it."""
    FAILED = "failed"
    """Something broke, or the episode's group closed without it; ``error`` says what. Not the
    agent's doing."""


@dataclass(frozen=True)
class Start:
    """Where an episode begins: at a task, or part-way through an earlier episode of it."""

    task: Task
    seed: int
    """Seeds the world. Attempts of one group share it, so that they meet the same world."""
    attempt: int = 0
    """Tells attempts apart; enters the seeds of sampling, not the world's."""
    prefix: tuple[Step, ...] = ()
    """Steps to replay before the policy acts."""
    turns: int | None = None
    """How many answers the policy may give after the prefix; None: up to the task's limit."""
    parent: str = ""
    """The id of the episode that ``prefix`` comes from; empty if there is none."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    task: Task
    steps: tuple[Step, ...]
    final: Observation
    """What the world showed last."""
    stop: Stop
    policy: str
    """The checkpoint that acted."""
    seed: int
    """The world's seed."""
    attempt: int = 0
    replayed: int = 0
    """How many leading steps are those of ``Start.prefix``."""
    success: bool = False
    error: str = ""
    """Set if and only if ``stop`` is FAILED: the error's name, then what it said."""
    id: str = ""
    """Names this episode and no other one, for ever."""
    parent: str = ""
    """The id of the episode that the replayed steps come from; empty if there is none."""
    restored: int = 0
    """How many of those were not executed again, as the world went on from a snapshot."""

    @property
    def answers(self) -> tuple[int, ...]:
        """Which steps begin with an answer: all but the later actions of one."""
        return tuple(k for k, step in enumerate(self.steps) if not step.action.place)

    @property
    def turns(self) -> tuple[int, ...]:
        """Those of ``answers`` that were not replayed."""
        return tuple(k for k in self.answers if k >= self.replayed)

    @property
    def executed(self) -> int:
        """How many steps the world has made for it."""
        return len(self.steps) - self.restored

    @property
    def reward(self) -> float:
        """Sum of all steps' rewards."""
        return sum(step.reward for step in self.steps)


@dataclass(frozen=True, slots=True)
class Verdict:
    score: float | None
    """In [0, 1]; None if the judge could not decide (never counted as 0)."""
    feedback: str
    """Why, in words."""
    judge: str
    steps: tuple[float | None, ...] = ()
    """A score for each step, from judges that give such; each in [0, 1] or None."""


@dataclass(frozen=True, slots=True)
class Judged:
    trajectory: Trajectory
    verdict: Verdict


Aggregation: TypeAlias = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]
"""How token losses become one number: mean over all tokens of the batch; mean over sequences of
each one's token mean; mean over sequences of token sums; the same over a constant (Dr.GRPO)."""


@dataclass(frozen=True, slots=True)
class TokenArrays:
    """What a loss sees: the trained tokens of a micro-batch, flattened; (N,) float32, nats.

    N tokens, a vocabulary of V, D hidden units.
    """

    logprobs: Any
    """Under the weights being trained; carries the gradient."""
    old_logprobs: Any
    """Under the policy that sampled; ``logprobs`` detached where unknown."""
    advantages: Any
    reference_logprobs: Any = None
    """Under the frozen base model; None unless the loss asks for it."""
    examples: Any = None
    """(N,) int64: the token's example, by its place in the batch; its tokens follow one another."""
    groups: Any = None
    """(N,) int64: that example's ``group``."""
    distribution: Any = None
    """(N, V): log-probabilities of every token there, under the weights being trained; carries the
    gradient. This and what follows is None unless the loss asks for it."""
    teacher: Any = None
    """(N, V): the same under the loss's teacher."""
    states: Any = None
    """(N, D): what the model's head reads there, without gradient."""


class Need(StrEnum):
    """What a loss must be given beside log-probabilities and advantages; the learner serves it."""

    REFERENCE = "reference"
    """``TokenArrays.reference_logprobs``."""
    DISTRIBUTION = "distribution"
    """``TokenArrays.distribution``, and ``teacher``; the loss is a ``DistributionLoss``."""
    STATES = "states"
    """``TokenArrays.states``."""
    WHOLE_STEP = "whole step"
    """To see all of an optimiser step's tokens first; the loss is a ``StepLoss``."""
    ADVERSARY = "adversary"
    """That parameters of its own are learned against it; the loss is an ``AdversarialLoss``."""


class Loss(Protocol):
    """Settings, frozen, that are also the function from token arrays to token losses.

    Without a reference it is 0 wherever the advantage is 0: such rows count in every mean, but
    nobody computes them.
    """

    @property
    def aggregation(self) -> Aggregation: ...
    @property
    def length(self) -> int:
        """The constant of ``seq-mean-token-sum-norm``, in tokens."""
        ...

    @property
    def needs(self) -> frozenset[Need]: ...
    def __call__(self, arrays: TokenArrays) -> Any:
        """(N,) losses, before aggregation."""
        ...


class StepLoss(Loss, Protocol):
    """A loss that looks at a whole optimiser step before it says what each token counts."""

    def weigh(self, arrays: TokenArrays, seed: int) -> Any:
        """(N,) float32: what the losses of all of a step's tokens are multiplied by.

        0 leaves a token out, though it still counts in the means. ``arrays`` carries no gradient.
        """
        ...


class DistributionLoss(Loss, Protocol):
    """A loss that compares whole distributions."""

    @property
    def teacher(self) -> str:
        """A model folder or hub id, of the vocabulary of the model in training."""
        ...


class AdversarialLoss(Loss, Protocol):
    """A loss with parameters of its own, which climb it once before the weights descend it."""

    def meet(self, states: int, vocabulary: int, device: Any) -> Sequence[Any]:
        """Those parameters, there, made if they are not yet for arrays of these widths."""
        ...

    def climb(self) -> None:
        """One step up the gradients that are in them; they are gone afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class Example:
    prompt: Prompt
    completion: Completion
    advantage: float = 1.0
    """Multiplies log p(completion | prompt); 1 is plain imitation."""
    group: int = -1
    """Examples of one group are learned in the same optimiser step; below 0, in any."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference: learned through DPO or a reward model, not by the plain loop."""

    prompt: Prompt
    chosen: Completion
    rejected: Completion


@dataclass(frozen=True, slots=True)
class Batch:
    """What to learn, by which loss, and how often."""

    loss: Loss
    examples: tuple[Example, ...]
    epochs: int = 1
    fresh: bool = False
    """Learn from the base model on, with a new optimiser, instead of going on; at the learning
    rate that the run begins with, whatever its schedule."""
