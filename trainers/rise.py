"""Recursive introspection: learn to mend one's last attempt (Qu et al. 2024, arXiv:2407.18219)."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ..core.protocols import Attempt, Context, Plan
from ..core.seeds import derive
from ..core.types import Batch, Example, Judged, Start, Step, Trajectory
from .credit import TrainerConfig, by_task, example, score
from .loss import NLL


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
    gamma: float = Field(default=1.0, ge=0, le=1)
    """With ``unit: episode``: an action k steps before the end has gamma**k of the score."""

    @model_validator(mode="after")
    def _settled(self) -> Self:
        if self.settle and (self.teacher or self.unit == "episode"):
            raise ValueError("settle goes with unit: turn and without a teacher")
        return self


class RISE:
    """Roll out turn by turn, keep the best of several candidates, imitate with exp(r / tau).

    Every state is one the policy reached itself. A turn's reward r is the judge's score of the
    conversation up to it. Nothing is learned after the first success, and only the last turn of
    each prefix is a target.

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
        play = await self._improver()
        examples: list[Example] = []
        scores: dict[tuple[str, int], list[float]] = {}
        turns = self._config.turns if self._config.unit == "turn" else 1
        for turn in range(turns):
            starts: list[Start] = []
            for group in by_task(judged):
                earlier = scores.setdefault(
                    (group[0].trajectory.task.id, group[0].trajectory.seed), []
                )
                examples += self._learn(group, earlier)
                carried = max(group, key=score) if self._config.history == "best" else group[0]
                earlier.append(score(carried))
                if turn + 1 < turns:
                    starts += self._retries(carried.trajectory)
            if not starts:
                break
            judged = await play(starts)
        if not examples:
            return []
        if self._config.normalize:
            mean = sum(e.advantage for e in examples) / len(examples)
            examples = [replace(e, advantage=e.advantage / mean) for e in examples]
        return [Batch(NLL(), tuple(examples), self._config.epochs)]

    async def _improver(self) -> Attempt:
        if self._config.teacher:
            return await self._context.play_as(self._config.teacher)
        return self._context.attempt_blind if self._config.settle else self._context.attempt

    def _retries(self, carried: Trajectory) -> list[Start]:
        """Candidates for the turn after ``carried``; none once it is solved or out of steps."""
        # By the task, so that a conversation that goes on goes on to its end.
        share = derive(carried.task.id, carried.seed, "settle") / 2**63
        right = carried.steps[-1:] and carried.steps[-1].reward >= 1
        done = carried.success or right
        if (done and share >= self._config.settle) or len(carried.steps) >= carried.task.max_steps or not carried.steps:
            return []
        return [
            Start(carried.task, carried.seed, attempt, carried.steps, turns=1)
            for attempt in range(self._config.samples)
        ]

    def _learn(self, group: Sequence[Judged], earlier: Sequence[float]) -> list[Example]:
        """The examples of one state: its candidates, or the best of them."""
        config = self._config
        baseline = self._baseline([score(one) for one in group])
        ranked = sorted(group, key=score, reverse=True)
        said: set[str] = set()
        examples: list[Example] = []
        for one in ranked[:1] if config.keep == "best" else ranked:
            trajectory, reward = one.trajectory, score(one)
            new = trajectory.steps[trajectory.replayed :]
            if not kept(config.filter, reward, earlier) or any(map(degenerate, texts(new))):
                continue
            action = "\n".join(texts(new))
            before = texts(trajectory.steps[: trajectory.replayed])
            # A wrong attempt is not worth repeating; to repeat a right one is what settling is.
            if action in said or (action in before and not (self._config.settle and reward >= 1)):
                continue
            said.add(action)
            for turn in range(trajectory.replayed, len(trajectory.steps)):
                left = len(trajectory.steps) - 1 - turn
                discounted = reward * config.gamma**left if config.unit == "episode" else reward
                weight = math.exp((discounted - baseline) / config.tau)
                examples.append(example(self._context.agent, trajectory, turn, weight))
        return examples

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

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"rise keeps no state, got keys {sorted(state)}")


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
