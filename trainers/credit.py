"""From judged trajectories to groups, and from trajectories to examples."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from ..core.config import Config
from ..core.errors import LearnerError
from ..core.protocols import Agent
from ..core.store import read_trajectories
from ..core.types import Aggregation, Completion, Example, Judged, Prompt, Trajectory
from .loss import NLL


class TrainerConfig(Config):
    """What every trainer's config has: how much is played before it is called."""

    tasks_per_iteration: int = Field(default=64, ge=1)
    attempts_per_task: int = Field(default=1, ge=1)
    """The size of a group."""
    epochs: int = Field(default=1, ge=1)
    """Passes over an iteration's examples."""
    aggregation: Aggregation = "seq-mean-token-mean"
    """How the token losses of imitation become one number."""
    length: int = Field(default=1, ge=1)
    """The constant, in tokens, of ``aggregation: seq-mean-token-sum-norm``."""

    @property
    def nll(self) -> NLL:
        return NLL(self.aggregation, self.length)


def key(judged: Judged) -> tuple[str, int]:
    """What attempts of one group, or turns of one conversation, have in common."""
    return judged.trajectory.task.id, judged.trajectory.seed


def by_task(batch: Iterable[Judged]) -> list[list[Judged]]:
    """Groups of attempts at one task with one seed, without the undecided; never an empty group."""
    groups: dict[tuple[str, int], list[Judged]] = {}
    for judged in batch:
        if judged.verdict.score is not None:
            groups.setdefault(key(judged), []).append(judged)
    return list(groups.values())


def score(judged: Judged) -> float:
    """The verdict's score, of one that ``by_task`` let through."""
    assert judged.verdict.score is not None, "by_task drops the undecided"
    return judged.verdict.score


def example(trajectory: Trajectory, turn: int, weight: float) -> Example:
    """One turn to imitate: its ids as sampled, or its text where it was not sampled.

    The log-probabilities of sampling are left out: imitation does not compare with the past.
    """
    action = trajectory.steps[turn].action
    said = action.completion
    return Example(
        asked(trajectory, turn),
        Completion(said.text, said.token_ids, tokenizer=said.tokenizer),
        weight,
    )


def asked(trajectory: Trajectory, turn: int) -> Prompt:
    """What an action answered.

    Raises:
        LearnerError: it was stored by a version that did not keep prompts, or nobody was asked.
    """
    prompt = trajectory.steps[turn].action.prompt
    if not prompt.messages:
        raise LearnerError(
            f"the episode {trajectory.id!r} of {trajectory.task.id!r} holds no prompts: nobody was "
            "asked, or a version of selfwright stored it that did not keep them; play it again"
        )
    return prompt


def stored(path: Path, agent: Agent) -> list[Judged]:
    """What ``read_trajectories`` finds there.

    Versions that did not keep prompts have left it to their readers to ask the agent for them.

    Raises:
        StoreError: as there.
    """
    return [
        replace(one, trajectory=prompted(one.trajectory, agent)) for one in read_trajectories(path)
    ]


def prompted(trajectory: Trajectory, agent: Agent) -> Trajectory:
    """The same, with prompts where there are none, as the agent makes them today."""
    steps = list(trajectory.steps)
    for turn, step in enumerate(steps):
        if not step.action.prompt.messages:
            prompt = agent.prompt(trajectory.task, steps[:turn], step.observation)
            steps[turn] = replace(step, action=replace(step.action, prompt=prompt))
    return replace(trajectory, steps=tuple(steps))


def reinforce(trajectory: Trajectory, advantages: Sequence[float]) -> list[Example]:
    """Every turn that was not replayed, as sampled, with its log-probabilities of then.

    Args:
        advantages: one for each of those turns.
    """
    own = range(trajectory.replayed, len(trajectory.steps))
    return [
        Example(
            asked(trajectory, turn),
            trajectory.steps[turn].action.completion,
            advantage,
        )
        for turn, advantage in zip(own, advantages, strict=True)
    ]


def imitate(trajectory: Trajectory, weight: float = 1.0) -> list[Example]:
    """Every turn that was not replayed."""
    turns: Sequence[int] = range(trajectory.replayed, len(trajectory.steps))
    return [example(trajectory, turn, weight) for turn in turns]
