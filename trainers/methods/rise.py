"""Recursive introspection: learn to mend one's last attempt (Qu et al. 2024, arXiv:2407.18219)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Self

from pydantic import Field, model_validator

from ...core.protocols import Context, Plan
from ...core.seeds import derive
from ...core.types import Batch, Judged, Start, Stop
from ..parts.credit import TrainerConfig, key, score
from ..parts.lessons import Baseline, Filter, Lesson, kept, reward, sound, state_baseline, texts


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
    filter: Filter = "all"
    """Which turns: all; better than the turn before; with no better turn before; solved. The
    first turn is always kept, except by ``success``."""
    tau: float = Field(default=0.4, gt=0)
    invalid_reward: float | None = None
    """What a turn earns in place of its score if no action can be read from it or, where each is a
    whole attempt, no answer: the paper's code has -1 for GSM8K, 0 for MATH. None: its score, which
    is never below 0."""
    baseline: Baseline = "none"
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


class RISE:
    """Roll out turn by turn, keep the best of several candidates, imitate with exp(r / tau).

    Every state is one the policy reached itself: where a teacher mends, the conversation goes on
    from the policy's own next attempt. A turn's reward r is the judge's score up to it. Nothing is
    learned after the first success; only the last turn of a prefix is a target; degenerate text is
    as if it had not been said.

    Departures, each an option whose default is the paper's: ``keep: all``, ``history: sampled``,
    ``unit: episode``, ``settle``, ``normalize``, state baselines, ``gamma``. Others: rewards are
    in [0, 1] and what cannot be read earns 0, unless ``invalid_reward`` says -1; an attempt that
    was made before in its conversation is not learned again; of equals the earliest is the best; by
    default there are 4 turns and 8 samples, where the authors' example has 16; prompts open with no
    example dialogue; every iteration learns what it has played itself, with the optimiser going on.
    The paper's "knowledge boost" is a phase of ``imitation`` before this one.
    """

    Config = RISEConfig
    replays = True

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
                carried = max(group, key=self._reward) if config.history == "best" else group[0]
                conversations[key(group[0])].append(carried)
                starts += self._retries(carried)
            if last or not starts:
                break
            judged = await (teach or own)(starts)
        gamma = float(config.unit == "episode") if config.gamma is None else config.gamma
        taught = [lesson.examples(config.tau, gamma) for lesson in lessons]
        examples = [example for some in taught for example in some]
        if not examples:
            return []
        if config.normalize:
            mean = sum(e.advantage for e in examples) / len(examples)
            examples = [replace(e, advantage=e.advantage / mean) for e in examples]
        return [Batch(config.nll, tuple(examples), config.epochs)]

    def _reward(self, one: Judged) -> float:
        return reward(one, self._config.invalid_reward)

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
            Start(trajectory.task, trajectory.seed, attempt, trajectory.steps, 1, trajectory.id)
            for attempt in range(self._config.samples)
        ]

    def _learn(self, group: Sequence[Judged], conversation: list[Judged]) -> list[Lesson]:
        """The lessons of one state: its candidates, or the best of them."""
        config = self._config
        rewards = [self._reward(one) for one in group]
        baseline = state_baseline(rewards, config.baseline, config.constant)
        earlier = [self._reward(one) for one in conversation]
        ranked = sorted(group, key=self._reward, reverse=True)
        seen: set[str] = set()
        lessons: list[Lesson] = []
        for one in ranked[:1] if config.keep == "best" else ranked:
            trajectory, earned = one.trajectory, self._reward(one)
            action = "\n".join(texts(trajectory.steps[trajectory.replayed :]))
            before = texts(trajectory.steps[: trajectory.replayed])
            # A wrong attempt is not worth repeating; to repeat a right one is what settling is.
            repeats = action in before and not (config.settle and earned >= 1)
            if action in seen or repeats or not kept(config.filter, earned, earlier):
                continue
            seen.add(action)
            turn = len(conversation)
            lessons.append(Lesson(one, baseline, config.invalid_reward, turn, conversation))
        return lessons
