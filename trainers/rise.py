"""Recursive introspection: learn to mend one's last attempt (Qu et al. 2024, arXiv:2407.18219)."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from pydantic import Field, model_validator

from ..core.protocols import Context, Plan
from ..core.seeds import derive
from ..core.types import Batch, Example, Judged, Start, Step, Stop
from .credit import TrainerConfig, by_task, example, key, score


class RISEConfig(TrainerConfig):
    samples: int = Field(default=8, ge=1)
    """Candidates per state from the second turn on (the first has ``attempts_per_task``)."""
    turns: int = Field(default=4, ge=1)
    """Turns of a conversation, at most the task's own limit."""
    unit: Literal["turn", "episode"] = "turn"
    """What one attempt is: an action, answered by the world; or a whole episode, all of whose
    actions share its score (there is then one state per task, its start)."""
    history: Literal["best", "sampled"] = "best"
    """Which candidate the conversation goes on from: the best, or a fair sample of the policy."""
    settle: float = Field(default=0.0, ge=0, le=1)
    """The share of conversations that go on after a right attempt, in a world that does not say
    which attempts are right, to learn to stand by it: for agents that will have no oracle."""
    teacher: str = ""
    """Who plays the turns after the first. Empty: the policy (self-distillation); ``expert``: the
    world's; else a model folder or hub id (distillation)."""
    keep: Literal["best", "all"] = "best"
    """Which candidates of a state are learned."""
    filter: Literal["all", "better", "best", "success"] = "all"
    """Which turns: all; better than the turn before; with no better turn before; solved. The
    first turn is always kept, except by ``success``."""
    tau: float = Field(default=0.4, gt=0)
    baseline: Literal["none", "constant", "state_mean", "state_max"] = "none"
    constant: float = 0.0
    """The baseline of that name."""
    normalize: bool = False
    """Divide the weights by their mean."""
    gamma: float | None = Field(default=None, ge=0, le=1)
    """An action earns what it was paid, and gamma**k of what k turns later in its conversation was.
    None: 0 with ``unit: turn``, as in the paper's code; 1 with ``unit: episode``, where only the
    last action is paid, by the score."""

    @model_validator(mode="after")
    def _settled(self) -> Self:
        if self.settle and (self.teacher or self.unit == "episode"):
            raise ValueError("settle goes with unit: turn and without a teacher")
        return self


@dataclass(frozen=True)
class Lesson:
    """What one state teaches: one of its candidates."""

    judged: Judged
    baseline: float
    turn: int
    """Of the conversation."""
    conversation: list[Judged]
    """Its turns so far, and later ones as it goes on: what was carried on from each."""

    @property
    def later(self) -> list[float]:
        """Scores of the turns that followed; none if the conversation went on from another."""
        if self.turn < len(self.conversation) and self.conversation[self.turn] is self.judged:
            return [score(one) for one in self.conversation[self.turn + 1 :]]
        return []


class RISE:
    """Roll out turn by turn, keep the best of several candidates, imitate with exp(r / tau).

    Every state is one the policy reached itself: where a teacher mends, the conversation goes on
    from the policy's own next attempt. A turn's reward r is the judge's score of the conversation
    up to it. Nothing is learned after the first success, and only the last turn of each prefix is
    a target. Degenerate text is discarded as if it had not been said.

    Departures, each an option whose default is the paper's: ``keep: all``, ``history: sampled``,
    ``unit: episode``, ``settle``, ``normalize``, the state baselines, ``gamma``. Of equally good
    candidates the earliest is the best.
    """

    Config = RISEConfig

    def __init__(self, config: RISEConfig, context: Context) -> None:
        self._config = config
        self._context = context

    @property
    def plan(self) -> Plan:
        config = self._config
        turns = 1 if config.unit == "turn" else None
        return Plan(config.tasks_per_iteration, config.attempts_per_task, turns)

    async def batches(self, judged: Sequence[Judged]) -> list[Batch]:
        config, context = self._config, self._context
        own = context.attempt_blind if config.settle else context.attempt
        teach = await context.play_as(config.teacher) if config.teacher else None
        lessons: list[Lesson] = []
        conversations: dict[tuple[str, int], list[Judged]] = {}
        starts: list[Start] = []
        turns = config.turns if config.unit == "turn" else 1
        for turn in range(turns):
            groups = sound(judged)
            for group in groups:
                lessons += self._learn(group, conversations.setdefault(key(group[0]), []))
            last = turn + 1 == turns
            if teach and starts:
                again = [start for start in starts if not start.attempt]
                groups = [] if last else sound(await own(again))
            starts = []
            for group in groups:
                carried = max(group, key=score) if config.history == "best" else group[0]
                conversations[key(group[0])].append(carried)
                starts += self._retries(carried)
            if last or not starts:
                break
            judged = await (teach or own)(starts)
        examples = [example for lesson in lessons for example in self._examples(lesson)]
        if not examples:
            return []
        if config.normalize:
            mean = sum(e.advantage for e in examples) / len(examples)
            examples = [replace(e, advantage=e.advantage / mean) for e in examples]
        return [Batch(config.nll, tuple(examples), config.epochs)]

    def _retries(self, carried: Judged) -> list[Start]:
        """Candidates for the turn after ``carried``; none once it is solved or out of steps."""
        trajectory, settle = carried.trajectory, self._config.settle
        if not trajectory.steps or len(trajectory.steps) >= trajectory.task.max_steps:
            return []
        # A world that says nothing of success can go on from where the other one ended.
        if trajectory.stop != Stop.TRUNCATED and not settle:
            return []
        # By the task, so that a conversation that goes on goes on to its end.
        share = derive(trajectory.task.id, trajectory.seed, "settle") / 2**63
        if score(carried) >= 1 and share >= settle:
            return []
        return [
            Start(trajectory.task, trajectory.seed, attempt, trajectory.steps, turns=1)
            for attempt in range(self._config.samples)
        ]

    def _learn(self, group: Sequence[Judged], conversation: list[Judged]) -> list[Lesson]:
        """The lessons of one state: its candidates, or the best of them."""
        config = self._config
        baseline = self._baseline([score(one) for one in group])
        earlier = [score(one) for one in conversation]
        ranked = sorted(group, key=score, reverse=True)
        said: set[str] = set()
        lessons: list[Lesson] = []
        for one in ranked[:1] if config.keep == "best" else ranked:
            trajectory, reward = one.trajectory, score(one)
            action = "\n".join(texts(trajectory.steps[trajectory.replayed :]))
            before = texts(trajectory.steps[: trajectory.replayed])
            # A wrong attempt is not worth repeating; to repeat a right one is what settling is.
            repeats = action in before and not (config.settle and reward >= 1)
            if action in said or repeats or not kept(config.filter, reward, earlier):
                continue
            said.add(action)
            lessons.append(Lesson(one, baseline, len(conversation), conversation))
        return lessons

    def _examples(self, lesson: Lesson) -> list[Example]:
        config, trajectory = self._config, lesson.judged.trajectory
        whole = config.unit == "episode"
        gamma = float(whole) if config.gamma is None else config.gamma
        reward = sum(gamma**k * r for k, r in enumerate([score(lesson.judged), *lesson.later]))
        last = len(trajectory.steps) - 1
        return [
            example(
                self._context.agent,
                trajectory,
                turn,
                # Held below what overflows; the learner says so if it is more than it can bear.
                math.exp(
                    min((reward * gamma ** (last - turn) - lesson.baseline) / config.tau, 700)
                ),
            )
            for turn in range(trajectory.replayed, len(trajectory.steps))
        ]

    def _baseline(self, scores: Sequence[float]) -> float:
        match self._config.baseline:
            case "none":
                return 0.0
            case "constant":
                return self._config.constant
            case "state_mean":
                return sum(scores) / len(scores)
            case "state_max":
                return max(scores)


def sound(judged: Sequence[Judged]) -> list[list[Judged]]:
    """Groups of attempts at one task, without the undecided and the degenerate."""
    return by_task(
        one
        for one in judged
        if not any(map(degenerate, texts(one.trajectory.steps[one.trajectory.replayed :])))
    )


def kept(
    rule: Literal["all", "better", "best", "success"], reward: float, earlier: Sequence[float]
) -> bool:
    """Whether a turn with this reward is learned, after turns with those."""
    match rule:
        case "all":
            return True
        case "better":
            return not earlier or reward > earlier[-1]
        case "best":
            return not earlier or reward >= max(earlier)
        case "success":
            return reward >= 1


def degenerate(text: str) -> bool:
    """A word repeated more than 150 times, or one longer than 300 characters."""
    counts = Counter(text.split())
    return any(count > 150 or len(word) > 300 for word, count in counts.items())


def texts(steps: Iterable[Step]) -> list[str]:
    return [step.action.text for step in steps]
